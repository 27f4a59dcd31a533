"""What MxDs and transcoders share: from input to output by way of a top-k gate.

`TopKLayer` is an SAELens SAE whose input and output are different activations, and an MLP to
TransformerLens; `TrainingTopKLayer` is one that SAELens' trainer can train.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import SparseHookPoint
from sae_lens.util import dtype_to_str
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint

from mxd_lens.layers.kernels import (
    keep_unit_norm,
    pre_activations,
    to_dense,
    topk_gate,
    topk_relu,
    weighted_row_sum,
)
from mxd_lens.layers.objective import split_pairs, step_output

Codes: TypeAlias = tuple[Tensor, Tensor] | Tensor

"""Coefficients: values and indices [*batch, k], or dense [*batch, d_sae] where they have hooks."""

_CLOSURES = {
    "reshape_fn_in",
    "reshape_fn_out",
    "run_time_activation_norm_fn_in",
    "run_time_activation_norm_fn_out",
}

_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (HookPoint, SparseHookPoint)
}


def check_topk(cfg: Any, units: str) -> None:
    """Refuse a `TopKLayer`'s config that cannot work.

    Args:
        units: what the layer calls its d_sae units.

    Raises:
        ValueError: a width below 1, k out of range, or an SAE option that an input-to-output
            layer cannot honour.
    """
    for name in ("d_in", "d_out", "d_hidden", "d_sae"):
        if getattr(cfg, name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if not 1 <= cfg.k <= cfg.d_sae:
        raise ValueError(
            f"k={cfg.k} {units} cannot be active out of d_sae={cfg.d_sae}: need 1 <= k <= d_sae"
        )
    if cfg.apply_b_dec_to_input:
        raise ValueError("apply_b_dec_to_input: b_dec is an output bias here, it has no input side")
    if cfg.normalize_activations != "none" or cfg.reshape_activations != "none":
        raise ValueError(
            "this layer takes normalize_activations='none', reshape_activations='none'"
        )


@torch.no_grad()
def to_unit_norm_(W: Tensor, dim: int) -> None:
    """Scale the vectors along dim to unit norm, in place."""
    W.div_(torch.linalg.vector_norm(W, dim=dim, keepdim=True).clamp_min_(1e-12))


def has_hooks(hook: nn.Module) -> bool:
    """True if calling this hook point may do anything: a hook of any kind, its own or a global one,
    another module in its place (an attached SAE), or a replaced ``forward``."""
    return bool(
        _FORWARDS.get(type(hook)) is not type(hook).forward
        or "forward" in hook.__dict__
        or hook._forward_pre_hooks
        or hook._forward_hooks
        or hook._backward_pre_hooks
        or hook._backward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    )


def decode_codes(
    codes: Codes, table: Float[Tensor, "d_sae d"], *, unit_norm: bool = False
) -> Float[Tensor, "*batch d"]:
    """``a @ table``.

    Args:
        unit_norm: as `weighted_row_sum`'s.
    """
    if isinstance(codes, Tensor):
        return codes.to(table.dtype) @ (keep_unit_norm(table) if unit_norm else table)
    return weighted_row_sum(*codes, table, unit_norm=unit_norm)


def _of_a_plain_mlp(name: str) -> property:
    def read(layer: Any) -> Tensor:
        raise RuntimeError(
            f"{type(layer).__name__} has no {name}: it is not act(x W_in + b_in) W_out, so what "
            "reads an MLP's weights would be wrong about it"
        )

    return property(read)


class TopKLayer(SAE[Any]):
    """An input-to-output layer behind a top-k gate: what the MxD and the transcoders share.

    A subclass has W_enc [d_in, d_sae], b_enc [d_sae] and W_dec [d_sae, d_out], and tells by
    `_combine` how its output follows from its input and the coefficients' ``a W_dec``.
    Dense coefficients exist only where `has_hooks`.

    To TransformerLens it is an MLP with an output bias ``b_out`` and no other weights: what reads
    those (neurons' results, stacks over layers) raises a RuntimeError.
    """

    b_enc: nn.Parameter
    W_in = _of_a_plain_mlp("W_in")
    b_in = _of_a_plain_mlp("b_in")
    W_gate = _of_a_plain_mlp("W_gate")
    W_out = _of_a_plain_mlp("W_out")
    decode_reads_input: ClassVar[bool] = True
    """Whether the output depends on the input besides the coefficients."""
    gate_chunk_size: int = 1024
    """Tokens whose pre-activations exist at a time: set it lower to save memory."""

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()
        self._to_decode: Tensor | None = None
        self.setup()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the reference: W_enc uniform in +-1/sqrt(d_in), b_enc = 0, rows of W_dec uniform
        and scaled to unit norm. The other parameters are the subclass's to add."""
        cfg = self.cfg
        # Units are read one by one, so W_enc's columns are kept contiguous in memory.
        self.W_enc = nn.Parameter(self._uniform(cfg.d_sae, cfg.d_in).T)
        self.b_enc = nn.Parameter(self._zeros(cfg.d_sae))
        rows = self._zeros(cfg.d_sae, cfg.d_out).uniform_(-1, 1)
        self.W_dec = nn.Parameter(F.normalize(rows, dim=-1))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _uniform(self, *shape: int) -> Tensor:
        bound = self.cfg.d_in**-0.5
        return self._zeros(*shape).uniform_(-bound, bound)

    @property
    def d_out(self) -> int:
        return self.cfg.d_out

    @property
    def b_out(self) -> Float[Tensor, "d_out"]:
        """The output bias, b_dec, by TransformerLens' name."""
        return self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The layer's output, in x's dtype.

        Raises:
            ValueError: the last dimension of x is not d_in.
        """
        inputs = self.process_sae_in(x)
        y = self._combine(inputs, decode_codes(self._codes(inputs), self.W_dec))
        return self.hook_out(self.hook_sae_output(y.to(x.dtype)))

    def forward_with_activations(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_out"], Float[Tensor, "*batch d_sae"]]:
        """The output and the coefficients."""
        acts = self.encode(x)
        return self.decode(acts), acts

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The coefficients, written out densely. The next `decode` belongs to this x."""
        inputs = self.process_sae_in(x)
        if self.decode_reads_input:
            self._to_decode = inputs
        return self.hook_sae_acts_post(to_dense(*self._gate(inputs), self.cfg.d_sae))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """The output for these coefficients and, where the output depends on the input besides
        them, the input of the last `encode`, which it uses up.

        Raises:
            RuntimeError: that input is needed, and no `encode` came before, or one of another
                batch shape.
        """
        inputs, self._to_decode = self._to_decode, None
        if self.decode_reads_input and (
            inputs is None or inputs.shape[:-1] != feature_acts.shape[:-1]
        ):
            seen = "no encode" if inputs is None else f"an encode of {tuple(inputs.shape)}"
            raise RuntimeError(
                f"decode of coefficients {tuple(feature_acts.shape)} after {seen}: the output of "
                "this layer depends on its input, too, so call encode(x) first, then decode once"
            )
        return self._combine(inputs, feature_acts.to(self.dtype) @ self.W_dec)

    def process_sae_in(self, sae_in: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The input as the gate reads it: in the layer's dtype, hooked.

        Raises:
            ValueError: its last dimension is not d_in.
        """
        if sae_in.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"input has width {sae_in.shape[-1]}, this {type(self).__name__} has "
                f"d_in={self.cfg.d_in}"
            )
        return self.hook_sae_input(self.hook_in(sae_in.to(self.dtype)))

    def _codes(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        values, indices = self._gate(x)
        if has_hooks(self.hook_sae_acts_post):
            return self.hook_sae_acts_post(to_dense(values, indices, self.cfg.d_sae))
        return values, indices

    def _gate(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        gate, k, chunk_size = (x, self.W_enc, self.b_enc), self.cfg.k, self.gate_chunk_size
        if has_hooks(self.hook_sae_acts_pre):
            pre = pre_activations(*gate, chunk_size=chunk_size)
            return topk_relu(self.hook_sae_acts_pre(pre), k)
        return topk_gate(*gate, k, chunk_size=chunk_size)

    def _combine(self, x: Any, decoded: Tensor) -> Tensor:
        """Output for input x (None from a `decode` that reads none) and ``decoded = a W_dec``."""
        raise NotImplementedError

    def fold_W_dec_norm(self) -> None:
        self.fold_and_get_W_dec_norm()

    def fold_and_get_W_dec_norm(self) -> Tensor:
        raise NotImplementedError(
            "folding the norms of W_dec into the gate would change which k units are the largest"
        )

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise NotImplementedError(
            "only an SAE's output is scaled as its input is: this layer's is another activation"
        )

    def fold_activation_whitening(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            "only an SAE's output is whitened as its input is: this layer's is another activation"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> TopKLayer:
        super()._apply(fn, recurse)
        self._read_placement()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_placement()

    def _read_placement(self) -> None:
        """Say, in the config too, which dtype and device the weights have."""
        self.dtype, self.device = self.W_enc.dtype, self.W_enc.device
        self.cfg.dtype, self.cfg.device = dtype_to_str(self.dtype), str(self.device)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: neither the input of an encode still to be decoded, nor SAELens'
        closures, which cannot be pickled."""
        state = {name: value for name, value in self.__dict__.items() if name not in _CLOSURES}
        return state | {"_to_decode": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.turn_off_forward_pass_hook_z_reshaping()
        self._setup_activation_normalization()

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        expected = {name: tuple(p.shape) for name, p in self.state_dict().items()}
        found = {name: tuple(p.shape) for name, p in state_dict.items()}
        if expected != found:
            wrong = sorted(expected.items() ^ found.items())
            raise ValueError(
                f"these weights are not those of the {self.cfg.architecture()} that cfg.json "
                f"describes; they differ in {wrong}"
            )
        for name, weight in state_dict.items():
            state_dict[name] = weight.to(self.dtype)
        state_dict["W_enc"] = state_dict["W_enc"].T.contiguous().T


class TrainingTopKLayer(TopKLayer, TrainingSAE[Any]):
    """A `TopKLayer` as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``."""

    unit_norm_decoder: ClassVar[bool] = True
    """Whether rows of W_dec are kept at unit norm, and their gradient orthogonal to them."""

    @torch.no_grad()
    def renormalise(self) -> None:
        """What is kept at unit norm back to it, before every step."""
        if self.unit_norm_decoder:
            to_unit_norm_(self.W_dec, -1)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The layer and its loss on one batch, see `step_output`.

        Raises:
            ValueError: the batch is not d_in + d_out wide.
        """
        x, y = split_pairs(step_input.sae_in, self.cfg.d_in, self.cfg.d_out)
        self.renormalise()
        inputs = self.process_sae_in(x)
        codes = self._codes(inputs)
        decoded = decode_codes(codes, self.W_dec, unit_norm=self.unit_norm_decoder)
        y_hat = self._combine(inputs, decoded)
        return step_output(y, y_hat, codes, self.cfg.d_sae, self._aux_losses(codes, y))

    def _aux_losses(self, codes: Codes, y: Tensor) -> dict[str, Tensor]:
        """What the loss has besides the output's error."""
        return {}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.encode(x)
        return acts, acts

    def calculate_aux_loss(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {}

    def get_coefficients(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def to_inference(self) -> SAE[Any]:
        """The layer that `save_inference_model` would write."""
        state_dict = {name: p.detach().clone() for name, p in self.state_dict().items()}
        self.process_state_dict_for_saving_inference(state_dict)
        sae = SAE.from_dict(self.cfg.get_inference_sae_cfg_dict())
        sae.process_state_dict_for_loading(state_dict)
        sae.load_state_dict(state_dict)
        return sae
