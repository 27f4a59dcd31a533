"""Put layers in place of a language model's MLPs, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from sae_lens.saes.sae import SAE
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge


class splice:
    """Replace MLPs of a HookedTransformer or TransformerBridge; their hook points come along.

    Takes effect at once, for good or, as a context manager, until the block is left::

        splice(model, {6: mxd})                    # for good; .restore() undoes it
        with splice(model, {6: mxd, 7: other}):    # restored on exit, exceptions included
            model.run_with_cache(tokens, names_filter="blocks.6.mlp.hook_experts")

    Args:
        model: the language model.
        layers: the replacement for each layer's MLP: a module [.., d_model] -> [.., d_model].

    Raises:
        ValueError: a layer that does not exist, has no MLP, or whose width is not the module's
            ``cfg.d_in``/``cfg.d_out``. Nothing has been replaced then.
    """

    def __init__(self, model: Any, layers: Mapping[int, nn.Module]):
        if not isinstance(model, (HookedTransformer, TransformerBridge)):
            raise ValueError(
                f"cannot splice into a {type(model).__name__}: need a HookedTransformer "
                "or a TransformerBridge"
            )
        for layer, module in layers.items():
            _check_fits(model, layer, module)
        self.model = model
        self._originals: dict[int, tuple[nn.Module, dict[str, HookPoint]]] = {}
        for layer, module in layers.items():
            self._originals[layer] = _replace(model, layer, module)

    def restore(self) -> None:
        """Put the original MLPs back. Safe to call twice."""
        while self._originals:
            layer, (mlp, hooks) = self._originals.popitem()
            _replace(self.model, layer, mlp, hooks)

    def __enter__(self) -> splice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()


def get_mlp(model: Any, layer: int) -> nn.Module:
    """``model.blocks[layer].mlp``.

    Raises:
        ValueError: the model has no such layer, or no MLP there.
    """
    n_layers = len(model.blocks)
    if not 0 <= layer < n_layers:
        raise ValueError(f"no layer {layer}: this model has layers 0 to {n_layers - 1}")
    mlp = model.blocks[layer]._modules.get("mlp")
    if mlp is None:
        raise ValueError(f"layer {layer} of this model has no MLP")
    return mlp


def _check_fits(model: Any, layer: int, module: nn.Module) -> None:
    get_mlp(model, layer)
    cfg = getattr(module, "cfg", None)
    if isinstance(module, SAE) and not hasattr(cfg, "d_out"):
        raise ValueError(
            f"the replacement for layer {layer} reads what it writes: an SAE is attached to the "
            "model with add_sae, not put in the place of an MLP"
        )
    for name in ("d_in", "d_out"):
        width = getattr(cfg, name, None)
        if width is not None and width != model.cfg.d_model:
            raise ValueError(
                f"the replacement for layer {layer} has {name}={width}, "
                f"the model has d_model={model.cfg.d_model}"
            )


def _replace(
    model: Any, layer: int, module: nn.Module, hooks: dict[str, HookPoint] | None = None
) -> tuple[nn.Module, dict[str, HookPoint]]:
    """Replace an MLP, the model's hook registry following.

    Args:
        hooks: the module's entries in a bridge's registry, where they are known.

    Returns:
        The old MLP, and its entries in a bridge's registry.
    """
    block = model.blocks[layer]
    old = get_mlp(model, layer)
    if isinstance(model, HookedTransformer):
        block.mlp = module
        model.setup()
        _name_hooks(old)
        return old, {}
    # A bridge's block mirrors a Hugging Face layer, which runs the MLP under its own name.
    huggingface_layer = block.original_component
    name = next(name for name, child in huggingface_layer.named_children() if child is old)
    mirrored = block.__dict__.get("hook_mlp_out") is getattr(old, "hook_out", None)
    setattr(huggingface_layer, name, module)
    block._modules["mlp"] = module
    block.submodules["mlp"] = module
    if mirrored and isinstance(hook_out := getattr(module, "hook_out", None), HookPoint):
        block.__dict__["hook_mlp_out"] = hook_out
    prefix = f"blocks.{layer}.mlp."
    registry = model._hook_registry
    removed = {name: registry.pop(name) for name in list(registry) if name.startswith(prefix)}
    _name_hooks(old)
    if hooks is None:
        model._scan_existing_hooks(module, prefix.removesuffix("."))
    else:
        registry.update(hooks)
    model._block_alias_cache = None
    return old, removed


def _name_hooks(module: nn.Module) -> None:
    """A layer taken out is its own root again, and so its hook points have its own names."""
    if isinstance(module, HookedRootModule):
        module.setup()
