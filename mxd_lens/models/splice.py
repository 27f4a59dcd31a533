"""Put layers in place of a language model's MLPs, and take them out again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from sae_lens.saes.sae import SAE, SAEMetadata
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

_PROCESSING = ("enable_compatibility_mode", "process_weights", "load_and_process_state_dict")
"""Methods that fold and center the weights a model has, as they know them."""


class splice:
    """Replace MLPs of a HookedTransformer or TransformerBridge; their hook points come along.

    Takes effect at once, for good or, as a context manager, until the block is left::

        splice(model, {6: mxd})                    # for good; .restore() undoes it
        with splice(model, {6: mxd, 7: other}):    # restored on exit, exceptions included
            model.run_with_cache(tokens, names_filter="blocks.6.mlp.hook_experts")

    While layers are spliced in, the model refuses to process its weights (fold norms, center; on a
    bridge, compatibility mode), with a RuntimeError: it would leave theirs out. Nothing of this can
    be checked where ``model.blocks[6].mlp = mxd`` is assigned by hand. A bridge's ``state_dict``
    has nothing of spliced layers: save them by themselves.

    Args:
        layers: the replacement for each layer's MLP: a module [.., d_model] -> [.., d_model].

    Raises:
        ValueError: not a module, one at two layers, a layer that `get_mlp` refuses, of another
            width than the module's cfg has, or whose inputs are not those the module was trained
            on (`has_folded_norms`). Nothing has been replaced then.
    """

    def __init__(self, model: Any, layers: Mapping[int, nn.Module]):
        if not isinstance(model, TransformerBridge) and not is_hooked(model):
            raise ValueError(
                f"cannot splice into a {type(model).__name__}: need a HookedTransformer "
                "or a TransformerBridge"
            )
        for layer, module in layers.items():
            _check_fits(model, layer, module)
        _check_apart(model, layers)
        self.model = model
        self._originals: dict[int, tuple[nn.Module, dict[str, HookPoint]]] = {}
        for layer, module in layers.items():
            self._originals[layer] = _replace(model, layer, module)
        _refuse_processing(model, bool(layers))

    def restore(self) -> None:
        """Put the original MLPs back. Safe to call twice."""
        if self._originals:
            _refuse_processing(self.model, -1)
        while self._originals:
            layer, (mlp, hooks) = self._originals.popitem()
            _replace(self.model, layer, mlp, hooks)

    def __enter__(self) -> splice:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def is_hooked(model: Any) -> bool:
    """Whether a model is a HookedTransformer, which TransformerLens 4 has no more: none is where
    its module has not been imported."""
    module = sys.modules.get("transformer_lens.HookedTransformer")
    return module is not None and isinstance(model, module.HookedTransformer)


def get_mlp(model: Any, layer: int) -> nn.Module:
    """``model.blocks[layer].mlp``; ValueError if there is no such layer, no MLP there, or none that
    can be told from the rest of the layer."""
    n_layers = len(model.blocks)
    if not 0 <= layer < n_layers:
        raise ValueError(f"no layer {layer}: this model has layers 0 to {n_layers - 1}")
    mlp = model.blocks[layer]._modules.get("mlp")
    if mlp is None:
        raise ValueError(f"layer {layer} of this model has no MLP")
    if isinstance(mlp, GeneralizedComponent):
        original: Any = mlp.original_component
        why = ""
        if mlp.name is None:
            why = "is no module of its own"
        elif "residual" in inspect.signature(original.forward).parameters:
            why = "adds the residual stream to its output"
        if why:
            raise ValueError(
                f"a TransformerBridge cannot hook or replace the MLP of layer {layer}, which in a "
                f"{type(original).__name__} {why}; load the model as a HookedTransformer, by its "
                "hub name"
            )
    return mlp


def has_folded_norms(model: Any) -> bool:
    """Whether weights were processed: norms folded into them, so that MLPs read other inputs."""
    if isinstance(model, TransformerBridge):
        return model._weights_processed
    return str(model.cfg.normalization_type).endswith("Pre")


def check_norms(model: Any, metadata: SAEMetadata, what: str) -> None:
    """Raise ValueError for a layer trained on weights that were processed otherwise than these."""
    trained_on, here = bool(metadata.norms_folded), has_folded_norms(model)
    if metadata.model_name is not None and trained_on != here:
        state = {True: "processed (norms folded in)", False: "unprocessed"}
        loads = {True: "HookedSAETransformer.from_pretrained", False: "mxd_lens.load_model"}
        raise ValueError(
            f"{what} was trained on {state[trained_on]} weights of {metadata.model_name}, this "
            f"model's are {state[here]}, so its MLPs read other inputs: load it as it was in "
            f"training ({loads[trained_on]} does)"
        )


def _refuse_processing(model: Any, change: int) -> None:
    """Shadow the methods that process weights for as long as any layer is spliced in."""
    n_splices = vars(model).get("_n_splices", 0) + change
    vars(model)["_n_splices"] = n_splices
    for name in _PROCESSING:
        if n_splices and hasattr(type(model), name):
            vars(model)[name] = partial(_refuse, name)
        else:
            vars(model).pop(name, None)


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(
        f"{name} would process the model's weights without those of the layers spliced into it: "
        "restore() its MLPs first"
    )


def _check_apart(model: Any, layers: Mapping[int, nn.Module]) -> None:
    """One module at two layers would have the hook names of one."""
    now = {layer: block._modules.get("mlp") for layer, block in enumerate(model.blocks)}
    after = now | dict(layers)
    for layer, module in layers.items():
        if other := [at for at, mlp in after.items() if mlp is module and at != layer]:
            raise ValueError(
                f"the replacement for layer {layer} is also at layer {other[0]}: its hook points "
                "have one name each, so use a copy"
            )


def _check_fits(model: Any, layer: int, module: nn.Module) -> None:
    get_mlp(model, layer)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"the replacement for layer {layer} must be a module, got {type(module).__name__}"
        )
    cfg = getattr(module, "cfg", None)
    if isinstance(module, SAE) and not hasattr(cfg, "d_out"):
        raise ValueError(
            f"the replacement for layer {layer} reads what it writes: an SAE is attached to the "
            "model with add_sae, not put in the place of an MLP"
        )
    metadata = getattr(cfg, "metadata", None)
    if isinstance(metadata, SAEMetadata):
        check_norms(model, metadata, f"the replacement for layer {layer}")
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
    """Replace an MLP, its entries in a bridge's registry included; the old ones of both."""
    block = model.blocks[layer]
    old = get_mlp(model, layer)
    if is_hooked(model):
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
