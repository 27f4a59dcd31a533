"""What input-to-output layers share: from input to output by way of sparse codes.

`PairLayer` is an SAELens SAE whose input and output are different activations, and an MLP to
TransformerLens; `SparseLayer` one with a gate. `TrainingPairLayer` makes either trainable by
SAELens' trainer, on batches ``cat([mlp_in, mlp_out], -1)``, with the reference's loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import SparseHookPoint
from sae_lens.util import dtype_to_str
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint

from mxd_lens.layers.codes import Codes, DenseCodes, SparseCodes
from mxd_lens.layers.kernels import (
    gate_values,
    pre_activation_chunks,
    pre_activations,
    token_of,
    topk_relu,
)
from mxd_lens.layers.layer import Layer

_CLOSURES = {
    "reshape_fn_in",
    "reshape_fn_out",
    "run_time_activation_norm_fn_in",
    "run_time_activation_norm_fn_out",
}

_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (HookPoint, SparseHookPoint)
}


def gate_chunk(d_sae: int, device: torch.device | str) -> int:
    """Tokens whose pre-activations exist at a time: on a CPU those that its caches hold best, 128
    MiB at most in float32; elsewhere 1 GiB, which is all of a usual batch."""
    if torch.device(device).type == "cpu":
        return max(16, min(1024, 2**25 // d_sae))
    return max(16, 2**28 // d_sae)


@dataclass(kw_only=True)
class PairConfig(SAEConfig):
    """What a `PairLayer` needs at inference.

    Args:
        d_out: width of the output (``d_in``, ``d_sae`` and the rest as in `SAEConfig`).

    Raises:
        ValueError: a width below 1, k out of range where there is one, or an SAE option that an
            input-to-output layer cannot honour.
    """

    d_out: int
    apply_b_dec_to_input: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_in", "d_out", "d_hidden", "d_sae"):
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_k(getattr(self, "k", 1), self.d_sae)
        if self.apply_b_dec_to_input:
            raise ValueError(
                "apply_b_dec_to_input: b_dec is an output bias here, it has no input side"
            )
        if self.normalize_activations != "none" or self.reshape_activations != "none":
            raise ValueError(
                "this layer takes normalize_activations='none', reshape_activations='none'"
            )


@dataclass(kw_only=True)
class TrainingPairConfig(PairConfig, TrainingSAEConfig):
    """Of a `TrainingPairLayer`: the fields of its inference configuration, and the recipe's."""

    decoder_init_norm: float | None = None


def check_k(k: float, d_sae: int) -> None:
    """Raises ValueError if so many units cannot be active at a time."""
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k:g} cannot be active out of d_sae={d_sae}: need 1 <= k <= d_sae")


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


def _of_a_plain_mlp(name: str) -> property:
    def read(layer: Any) -> Tensor:
        raise RuntimeError(
            f"{type(layer).__name__} has no {name}: it is not act(x W_in + b_in) W_out, so what "
            "reads an MLP's weights would be wrong about it"
        )

    return property(read)


class PairLayer(Layer, SAE[Any]):
    """A layer from one activation to another. A subclass has b_dec [d_out] and tells by `compute`
    how output and codes follow from the input.

    To TransformerLens it is an MLP with an output bias ``b_out`` and no other weights: what reads
    those (neurons' results, stacks over layers) raises a RuntimeError.
    """

    W_in: property = _of_a_plain_mlp("W_in")
    b_in: property = _of_a_plain_mlp("b_in")
    W_gate: property = _of_a_plain_mlp("W_gate")
    W_out: property = _of_a_plain_mlp("W_out")
    decode_reads_input: ClassVar[bool] = True
    """Whether the output depends on the input besides the codes."""
    hook_in: HookPoint
    hook_codes: HookPoint
    hook_out: HookPoint
    dtype: torch.dtype
    device: torch.device

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.hook_in = HookPoint()
        self.hook_codes = HookPoint()
        self.hook_out = HookPoint()
        self._to_decode: Tensor | None = None
        self.setup()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _uniform(self, *shape: int) -> Tensor:
        bound = self.cfg.d_in**-0.5
        return self._zeros(*shape).uniform_(-bound, bound)

    def compute(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_out"], Codes]:
        """Output and codes for an input as `process_sae_in` gives it."""
        raise NotImplementedError

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The activations written out, unhooked, for an input as `process_sae_in` gives it."""
        raise NotImplementedError

    def _decode(
        self, x: Float[Tensor, "*batch d_in"] | None, acts: Float[Tensor, "*batch d_sae"]
    ) -> Float[Tensor, "*batch d_out"]:
        """The output for these activations; x is None if not `decode_reads_input`."""
        raise NotImplementedError

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
        y, _ = self.compute(self.process_sae_in(x))
        return self.hook_out(self.hook_sae_output(y.to(x.dtype)))

    def forward_with_activations(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_out"], Float[Tensor, "*batch d_sae"]]:
        """The output and the activations."""
        acts = self.encode(x)
        return self.decode(acts), acts

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The activations, written out densely. The next `decode` belongs to this x."""
        inputs = self.process_sae_in(x)
        if self.decode_reads_input:
            self._to_decode = inputs
        return self.hook_sae_acts_post(self._encode(inputs))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Decode; layers whose output depends on the input, too, need the matching `encode` first.

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
                f"decode of activations {tuple(feature_acts.shape)} after {seen}: the output of "
                "this layer depends on its input, too, so call encode(x) first, then decode once"
            )
        return self._decode(inputs, feature_acts.to(self.dtype))

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

    def _apply(self, fn: Any, recurse: bool = True) -> PairLayer:
        super()._apply(fn, recurse)
        self._read_placement()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_placement()

    def _read_placement(self) -> None:
        """Say, in the config too, which dtype and device the weights have."""
        self.dtype, self.device = self.b_dec.dtype, self.b_dec.device
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

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        own = self.state_dict()
        expected = {name: tuple(p.shape) for name, p in own.items()}
        found = {name: tuple(p.shape) for name, p in state_dict.items()}
        if expected != found:
            wrong = sorted(expected.items() ^ found.items())
            raise ValueError(
                f"these weights are not those of the {self.cfg.architecture()} that cfg.json "
                f"describes; they differ in {wrong}"
            )
        for name, weight in state_dict.items():
            state_dict[name] = weight.to(own[name].dtype)


class SparseLayer(PairLayer):
    """A `PairLayer` behind a gate: what MxDs and transcoders share.

    A subclass has W_enc [d_in, d_sae], b_enc [d_sae] and W_dec [d_sae, d_out], and tells by
    `combine` how its output follows from its input and its codes; by `pick` which units are active,
    if not the k largest. Dense activations exist only while hooked.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    unit_norm_decoder: ClassVar[bool] = False
    """Whether rows of W_dec are kept at unit norm, and their gradient orthogonal to them."""

    @property
    def gate_chunk_size(self) -> int:
        """Tokens whose pre-activations exist at a time."""
        return gate_chunk(self.cfg.d_sae, self.device)

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

    def combine(
        self, x: Float[Tensor, "*batch d_in"], codes: Codes
    ) -> Float[Tensor, "*batch d_out"]:
        """The output for an input and its codes: the layer's one formula."""
        raise NotImplementedError

    def write_rows(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """By `combine`, which is affine in the codes."""
        at = units[:, None]
        one = SparseCodes(torch.ones_like(at, dtype=self.dtype), at, self.cfg.d_sae)
        return self.combine(x, one) - self.combine(x, one.with_values(0 * one.values))

    def at_codes(
        self, x: Float[Tensor, "*batch tokens d_in"], codes: Codes
    ) -> Float[Tensor, "*#batch tokens d_out"]:
        return self.combine(x, codes)

    def pick(
        self, chunks: Iterable[Float[Tensor, "chunk d_sae"]], batch: torch.Size
    ) -> SparseCodes:
        """Which units are active; called without gradients.

        Args:
            chunks: pre-activations, some tokens at a time, each in the memory of the one before.
            batch: shape of all tokens.
        """
        k, d_sae = self.cfg.k, self.cfg.d_sae
        return SparseCodes(*topk_relu(chunks, k, batch=batch, dtype=self.dtype), d_sae)

    def codes(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        return self._codes(self.process_sae_in(x))

    def gate(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes:
        """The codes of an input as `process_sae_in` gives it."""
        chunk_size, batch = self.gate_chunk_size, x.shape[:-1]
        if has_hooks(self.hook_sae_acts_pre):
            pre = pre_activations(x, self.W_enc, self.b_enc, chunk_size=chunk_size)
            pre = self.hook_sae_acts_pre(pre)
            codes = self._pick(pre.reshape(-1, pre.shape[-1]).split(chunk_size), batch)
            return codes.with_values(picked_from(pre, codes).relu())
        gate = (x, self.W_enc, self.b_enc)
        codes = self._pick(pre_activation_chunks(*gate, chunk_size=chunk_size), batch)
        return codes.with_values(
            gate_values(codes.values, codes.indices, *gate, counts=codes.counts)
        )

    @torch.no_grad()
    def _pick(self, chunks: Iterable[Tensor], batch: torch.Size) -> SparseCodes:
        return self.pick(chunks, batch)

    def compute(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_out"], Codes]:
        codes = self._codes(x)
        return self.combine(x, codes), codes

    def _codes(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        codes = self.hook_codes(self.gate(x))
        if has_hooks(self.hook_sae_acts_post):
            return DenseCodes(self.hook_sae_acts_post(codes.to_dense()))
        return codes

    def _encode(self, x: Tensor) -> Tensor:
        return self.hook_codes(self.gate(x)).to_dense()

    def _decode(self, x: Any, acts: Tensor) -> Tensor:
        return self.combine(x, DenseCodes(acts))

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].T.contiguous().T


def picked_from(pre: Float[Tensor, "*batch d_sae"], codes: SparseCodes) -> Tensor:
    """The entries of pre at the codes' places, in the codes' shape."""
    if codes.counts is None:
        return pre.gather(-1, codes.indices)
    return pre.reshape(-1, pre.shape[-1])[token_of(codes.indices, codes.counts), codes.indices]


class TrainingPairLayer(PairLayer, TrainingSAE[Any]):
    """A `PairLayer` as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``."""

    splits_batches: ClassVar[bool] = True

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Called before each step: here, nothing has a norm to keep."""

    def losses(
        self, y_hat: Float[Tensor, "batch d_out"], y: Float[Tensor, "batch d_out"], codes: Codes
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses that are summed, by name."""
        return {"mse_loss": pair_loss(y_hat, y)}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The layer and its losses on one batch, as `SAETrainer` reads it.

        ``sae_in`` is the target, from which SAETrainer logs explained variance; ``feature_acts``
        is what it counts firings of: detached codes where they are sparse, else a tensor [batch,
        d_sae].

        Raises:
            ValueError: the batch is not d_in + d_out wide.
        """
        x, y = split_pairs(step_input.sae_in, self.cfg.d_in, self.cfg.d_out)
        self.normalize_decoder()
        y_hat, codes = self.compute(self.process_sae_in(x))
        losses = self.losses(y_hat, y, codes)
        return TrainStepOutput(
            sae_in=y,
            sae_out=y_hat.to(y.dtype),
            feature_acts=codes.for_counting(),
            hidden_pre=codes.values,
            loss=torch.stack(list(losses.values())).sum(),
            losses={name: loss.detach() for name, loss in losses.items()},
        )

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


class TrainingSparseLayer(SparseLayer, TrainingPairLayer):
    """A `SparseLayer` as `SAETrainer` trains it, rows of W_dec at unit norm."""

    unit_norm_decoder: ClassVar[bool] = True

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Re-normalise decoder rows, before each step."""
        if self.unit_norm_decoder:
            to_unit_norm_(self.W_dec, -1)


def split_pairs(
    pairs: Float[Tensor, "batch d_pair"], d_in: int, d_out: int
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
    """(mlp_in, mlp_out) of a training batch ``cat([mlp_in, mlp_out], -1)``.

    Raises:
        ValueError: the batch is not d_in + d_out wide.
    """
    if pairs.shape[-1] != d_in + d_out:
        raise ValueError(
            f"a training batch has width {pairs.shape[-1]}, need d_in + d_out = "
            f"{d_in + d_out}: cat([mlp_in, mlp_out], -1)"
        )
    x, y = pairs.split([d_in, d_out], dim=-1)
    return x, y


def pair_loss(
    y_hat: Float[Tensor, "batch d_out"], y: Float[Tensor, "batch d_out"]
) -> Float[Tensor, ""]:
    """Mean over tokens and outputs of ``(y_hat - y)^2 / ||y||_2`` (the reference's loss)."""
    norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return ((y_hat.to(y.dtype) - y).square() / norm).mean()
