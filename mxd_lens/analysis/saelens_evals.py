"""SAELens' `run_evals` for layers that read one hook and write another.

By itself it puts ``decode(encode(act))`` back at ``metadata.hook_name``, which for an MxD or a
transcoder is the MLP's input. Here the layer stands at its output hook instead, with the input
of the same forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from sae_lens import evals
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor


def run_evals(
    sae: SAE[Any],
    activation_store: ActivationsStore,
    model: Any,
    activation_scaler: ActivationScaler,
    *args: Any,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`sae_lens.evals.run_evals`, arguments and answer alike, with right numbers for layers whose
    ``metadata.hook_name_out`` is another hook than ``hook_name``: all are about the output.

    SAELens' conventions hold: special tokens keep the MLP's own output where the layer replaces
    it, but lose it under ablation; norms, errors and variance are the output's.

    Raises:
        ValueError: the model does not have the layer's hooks, or activations are to be rescaled,
            which has no meaning for a layer between two hooks.
    """
    with at_output(model, sae) as layer:
        if layer is not sae and activation_scaler != ActivationScaler():
            raise ValueError(
                "run_evals cannot rescale the activations of a layer between two hooks: "
                "fold the scale into its weights and pass ActivationScaler()"
            )
        return evals.run_evals(layer, activation_store, model, activation_scaler, *args, **kwargs)


@contextmanager
def at_output(model: Any, sae: SAE[Any]) -> Iterator[Any]:
    """The layer as an SAE of its output hook, for as long as the block lasts.

    What this yields has the layer's attributes, ``cfg.metadata.hook_name`` being its output hook.
    Its ``encode(y)`` reads the input that the model's last forward pass had at the layer's own
    input hook; ``decode`` gives the layer's output for it. Out of turn, both raise a RuntimeError.
    An SAE that reads and writes the same hook is yielded as it is.

    Raises:
        ValueError: the model does not have the layer's hooks.
    """
    metadata = sae.cfg.metadata
    if metadata.hook_name_out in (None, metadata.hook_name):
        yield sae
        return
    hook_in = model.hook_dict[_known_hook(model, str(metadata.hook_name))]
    layer = _AtOutput(sae, _known_hook(model, str(metadata.hook_name_out)))
    with ExitStack() as hooks:
        # Torch's own handles: these outlast TransformerLens' resets and remove nobody else's.
        hooks.callback(hook_in.register_forward_hook(layer.see_input).remove)
        hooks.callback(sae.hook_sae_acts_post.register_forward_hook(layer.see_acts).remove)
        yield layer


def _known_hook(model: Any, name: str) -> str:
    """The name the model runs this hook under: a bridge ignores other names silently."""
    if isinstance(model, SAETransformerBridge):
        name = model._resolve_hook_name(name)
    if name not in model.hook_dict:
        raise ValueError(f"this {type(model).__name__} has no hook {name}")
    return name


class _AtOutput:
    def __init__(self, sae: SAE[Any], hook_out: str):
        self._sae = sae
        self.cfg = copy.deepcopy(sae.cfg)
        self.cfg.metadata.hook_name = hook_out
        self._x: Tensor | None = None
        self._acts: Tensor | None = None
        self._y: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sae, name)

    def see_input(self, hook: Any, args: Any, x: Tensor) -> None:
        self._x = x

    def see_acts(self, hook: Any, args: Any, acts: Tensor) -> None:
        self._acts = acts

    def encode(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_sae"]:
        """The activations for the input that belongs to this output, which this uses up."""
        x, self._x = self._x, None
        if x is None or x.shape[:-1] != y.shape[:-1]:
            seen = "no input" if x is None else f"an input {tuple(x.shape)}"
            raise RuntimeError(f"encode of an output {tuple(y.shape)} after {seen}")
        # The layer's own forward, for not every decode of SAELens' knows its skip term.
        self._y = self._sae(x.to(self._sae.device, self._sae.dtype))
        assert self._acts is not None
        return self._acts

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """The output that belongs to the last `encode`."""
        if self._y is None or feature_acts is not self._acts:
            raise RuntimeError("decode takes what the last encode gave, and nothing else")
        return self._y
