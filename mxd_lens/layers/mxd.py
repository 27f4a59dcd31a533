"""The Mixture of Decoders: configuration, inference class and training class.

An MxD replaces an MLP or GLU by ``d_sae`` sparsely active experts, each a full-rank linear map
of the dense hidden units ``z`` (Oldfield et al. 2025, arXiv 2505.21364, section 2)::

    z = act(x W_hidden + b_hidden)                      an MLP         [.., d_hidden]
    z = act(x W_hidden_gate + b_hidden_gate) * (x W_hidden + b_hidden)      a GLU
    a = topk_k(relu(x W_enc + b_enc))                   coefficients   [.., d_sae]
    y = sum_n a_n W_n^T z + b_dec,  W_n = W_shared diag(W_dec[n])
      = (a W_dec) * (z W_shared) + b_dec                               [.., d_out]

The gate and the experts have SAELens' names. The dense part's are not those of TransformerLens'
MLPs, whose code would take the layer for one whose neurons write rows of W_out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import (
    SAEConfig,
    TrainingSAEConfig,
)
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mxd_lens.layers.base import (
    Codes,
    TopKLayer,
    TrainingTopKLayer,
    check_topk,
    decode_codes,
    has_hooks,
    to_unit_norm_,
)
from mxd_lens.layers.kernels import pre_activations, topk_gate, topk_relu
from mxd_lens.layers.mlp import ACTIVATIONS, read_mlp
from mxd_lens.layers.objective import pair_loss

Recipe = Literal["centred", "paper"]


@dataclass(kw_only=True)
class MxDConfig(SAEConfig):
    """Shape of an MxD; the fields a layer needs at inference.

    Args:
        d_out: width of the output (``d_in``, ``d_sae`` and the rest as in `SAEConfig`).
        d_hidden: width of the dense hidden units.
        k: experts active per token, 1 <= k <= d_sae.
        act_fn: activation of the hidden units, a key of `ACTIVATIONS`.
        gated: whether the hidden layer is a GLU.

    Raises:
        ValueError: k out of range, an unknown activation, or an SAE option that an
            input-to-output layer cannot honour.
    """

    d_out: int
    d_hidden: int
    k: int = 32
    act_fn: str = "silu"
    gated: bool = True
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "mxd"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)


def _check(cfg: MxDConfig | TrainingMxDConfig) -> None:
    check_topk(cfg, "experts")
    if cfg.act_fn not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation act_fn={cfg.act_fn!r}; known: {', '.join(ACTIVATIONS)}"
        )


class MxD(TopKLayer):
    """A Mixture of Decoders for inference: an MLP to TransformerLens, an SAE to SAELens.

    Parameters (``cfg.dtype``):
        W_enc [d_in, d_sae], b_enc [d_sae]: the experts' gate.
        W_dec [d_sae, d_out]: one row ``c_n`` per expert.
        W_hidden [d_in, d_hidden], b_hidden [d_hidden] and, for a GLU, W_hidden_gate, b_hidden_gate
            of the same shapes: the dense hidden units.
        W_shared [d_hidden, d_out], b_dec [d_out]: the decoder all experts share, the output bias.

    Hook points, in the order they fire: ``hook_in`` (``hook_sae_input``), ``hook_sae_acts_pre``
    and ``hook_sae_acts_post`` [.., d_sae], ``hook_experts`` (``a W_dec``) [.., d_out],
    ``hook_pre`` and, for a GLU, ``hook_pre_linear``, then ``hook_post`` (z) [.., d_hidden],
    ``hook_shared`` (``z W_shared``) [.., d_out], ``hook_sae_recons``, ``hook_sae_output`` and
    ``hook_out`` [.., d_out].
    """

    cfg: MxDConfig
    W_hidden: nn.Parameter
    b_hidden: nn.Parameter
    W_hidden_gate: nn.Parameter
    b_hidden_gate: nn.Parameter
    W_shared: nn.Parameter

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.hook_experts = HookPoint()
        self.hook_pre = HookPoint()
        if cfg.gated:
            self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()
        self.hook_shared = HookPoint()
        self.setup()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the reference: linear layers uniform in +-1/sqrt(fan_in), W_shared = 0 so that
        the output starts at b_dec = 0, rows of W_dec uniform and scaled to unit norm."""
        super().initialize_weights()
        cfg = self.cfg
        self.W_hidden = nn.Parameter(self._uniform(cfg.d_in, cfg.d_hidden))
        self.b_hidden = nn.Parameter(self._zeros(cfg.d_hidden))
        if cfg.gated:
            self.W_hidden_gate = nn.Parameter(self._uniform(cfg.d_in, cfg.d_hidden))
            self.b_hidden_gate = nn.Parameter(self._zeros(cfg.d_hidden))
        self.W_shared = nn.Parameter(self._zeros(cfg.d_hidden, cfg.d_out))
        self.b_dec = nn.Parameter(self._zeros(cfg.d_out))

    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_hidden"]:
        """The dense hidden units z."""
        act = ACTIVATIONS[self.cfg.act_fn]
        linear = x @ self.W_hidden + self.b_hidden
        if not self.cfg.gated:
            return self.hook_post(act(self.hook_pre(linear)))
        pre = self.hook_pre(x @ self.W_hidden_gate + self.b_hidden_gate)
        return self.hook_post(act(pre) * self.hook_pre_linear(linear))

    def _combine(self, x: Tensor, experts: Tensor) -> Tensor:
        experts = self.hook_experts(experts)
        shared = self.hook_shared(self.hidden(x) @ self.W_shared)
        return self.hook_sae_recons(experts * shared + self.b_dec)

    def expert_weights(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        """Expert n's linear map of the hidden units, ``W_n = W_shared diag(W_dec[n])``.

        Its rank is that of W_shared where ``W_dec[n]`` has no zero entry (paper, lemma 1).
        """
        return self.W_shared * self.W_dec[n]

    @classmethod
    @torch.no_grad()
    def from_mlp(cls, mlp: nn.Module, d_sae: int = 1, k: int = 1) -> MxD:
        """The MxD that computes exactly what this MLP or GLU does: ``a W_dec = 1`` everywhere.

        Args:
            mlp: ``model.blocks[L].mlp`` of a HookedTransformer or a TransformerBridge.
            d_sae, k: the first k experts are always on, each a k-th of the layer.

        Raises:
            ValueError: the module is neither an MLP nor a GLU, or has an unknown activation.
        """
        mlp_weights = read_mlp(mlp)
        W_in, W_out = mlp_weights["W_in"], mlp_weights["W_out"]
        cfg = MxDConfig(
            d_in=W_in.shape[0],
            d_out=W_out.shape[1],
            d_hidden=W_in.shape[1],
            d_sae=d_sae,
            k=k,
            act_fn=mlp_weights["act_fn"],
            gated="W_gate" in mlp_weights,
            dtype=str(W_in.dtype).removeprefix("torch."),
            device=str(W_in.device),
        )
        mxd = cls(cfg)
        mxd.copy_hidden_units(mlp_weights)
        mxd.W_shared.copy_(W_out)
        mxd.b_dec.copy_(mlp_weights["b_dec"])
        mxd.W_enc.zero_()
        mxd.b_enc[:k] = 1 / k
        mxd.W_dec.fill_(1.0)
        return mxd

    @torch.no_grad()
    def copy_hidden_units(self, mlp_weights: dict[str, Any]) -> None:
        """Take the hidden units' weights from `read_mlp`'s answer.

        Raises:
            ValueError: the MLP has other widths, kind or activation than this layer.
        """
        theirs = (tuple(mlp_weights["W_in"].shape), "W_gate" in mlp_weights, mlp_weights["act_fn"])
        ours = ((self.cfg.d_in, self.cfg.d_hidden), self.cfg.gated, self.cfg.act_fn)
        if theirs != ours:
            raise ValueError(
                f"this MLP has ((d_in, d_hidden), gated, act_fn) = {theirs}, the MxD {ours}"
            )
        self.W_hidden.copy_(mlp_weights["W_in"])
        self.b_hidden.copy_(mlp_weights["b_in"])
        if self.cfg.gated:
            self.W_hidden_gate.copy_(mlp_weights["W_gate"])
            self.b_hidden_gate.copy_(mlp_weights["b_gate"])


@dataclass(kw_only=True)
class TrainingMxDConfig(TrainingSAEConfig):
    """`MxDConfig`'s fields and the recipe.

    Args:
        recipe: ``"paper"``: gate with a bias, started at random. ``"centred"``: the gate reads
            ``x - gate_mean``, has no bias, rows of unit norm and one learned scale, so that
            every pre-activation has mean zero and no expert can always be on; saved as an
            ordinary gate. W_dec's rows are centred as well. Both recipes keep them at unit norm.
        aux_loss_coefficient: of the centred recipe: how much it counts that the coefficients tell
            the output by themselves, through a linear decoder that is dropped when saving. It
            keeps them from becoming idle where the dense part does nearly all of the work.
    """

    d_out: int
    d_hidden: int
    k: int = 32
    act_fn: str = "silu"
    gated: bool = True
    apply_b_dec_to_input: bool = False
    recipe: Recipe = "centred"
    aux_loss_coefficient: float = 0.3
    decoder_init_norm: float | None = None

    @classmethod
    def architecture(cls) -> str:
        return "mxd"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)
        if self.recipe not in get_args(Recipe):
            raise ValueError(f"recipe must be one of {get_args(Recipe)}, got {self.recipe!r}")


class TrainingMxD(MxD, TrainingTopKLayer):
    """The MxD as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``.

    Beside MxD's parameters, for the centred recipe: ``gate_mean`` [d_in] (a buffer) and
    ``log_gate_scale`` []; its gate is ``exp(log_gate_scale) * (x - gate_mean) W_enc``. And the
    decoder of its auxiliary loss, W_aux [d_sae, d_out] and b_aux [d_out].
    """

    cfg: TrainingMxDConfig  # type: ignore[assignment]
    gate_mean: Tensor

    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.recipe == "centred":
            self.register_buffer("gate_mean", self._zeros(self.cfg.d_in))
            self.log_gate_scale = nn.Parameter(self._zeros())
            self.b_enc.requires_grad_(False)
            self.W_aux = nn.Parameter(self._zeros(self.cfg.d_sae, self.cfg.d_out))
            self.b_aux = nn.Parameter(self._zeros(self.cfg.d_out))
            self.renormalise()

    @torch.no_grad()
    def start_from(self, mlp_weights: dict[str, Any], mlp_in: Float[Tensor, "batch d_in"]) -> None:
        """Start the centred recipe from the MLP's own hidden units and a sample of its inputs.

        W_shared stays zero. The gate's scale is set such that ``a W_dec`` has entries of size one.

        Raises:
            ValueError: the layer's recipe is another, or the MLP does not fit it.
        """
        if self.cfg.recipe != "centred":
            raise ValueError(f"start_from is the centred recipe's, this is {self.cfg.recipe!r}")
        self.copy_hidden_units(mlp_weights)
        self.gate_mean.copy_(mlp_in.mean(0))
        values, _ = self._gate(mlp_in.to(self.dtype))
        size = values.square().sum(-1).mean().div(self.cfg.d_out).sqrt()
        self.log_gate_scale.sub_(size.log())

    @torch.no_grad()
    def renormalise(self) -> None:
        """Rows of W_dec, and the centred gate's columns, back to unit norm.

        Centred experts, too: what all rows of W_dec share would make ``a W_dec`` constant and
        the choice of experts idle, so it is taken out first. Norming brings a little of it back,
        so repeated calls settle rather than stand still.
        """
        if self.cfg.recipe == "centred":
            self.W_dec.sub_(self.W_dec.mean(0))
            to_unit_norm_(self.W_enc, 0)
        super().renormalise()

    def _gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.cfg.recipe == "paper":
            return super()._gate(x)
        scale = self.log_gate_scale.exp()
        x = x - self.gate_mean
        gate, k = (x, self.W_enc, self.b_enc), self.cfg.k
        options: Any = {"unit_norm": True, "chunk_size": self.gate_chunk_size}
        if has_hooks(self.hook_sae_acts_pre):
            pre = pre_activations(*gate, **options)
            scaled = self.hook_sae_acts_pre(pre * scale)
            # Scaling rounds: what no hook has edited is ranked as it is without hooks, before it.
            rank = torch.where(scaled == pre * scale, pre, scaled / scale)
            _, indices = topk_relu(rank, k)
            return scaled.gather(-1, indices).relu(), indices
        values, indices = topk_gate(*gate, k, **options)
        return values * scale, indices

    def _aux_losses(self, codes: Codes, y: Tensor) -> dict[str, Tensor]:
        coefficient = self.cfg.aux_loss_coefficient
        if self.cfg.recipe == "paper" or not coefficient:
            return {}
        y_hat = decode_codes(codes, self.W_aux) + self.b_aux
        return {"auxiliary_loss": coefficient * pair_loss(y_hat, y)}

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold gate_mean and scale into an ordinary gate; drop the auxiliary decoder."""
        if self.cfg.recipe == "centred":
            del state_dict["W_aux"], state_dict["b_aux"]
            scale = state_dict.pop("log_gate_scale").exp()
            state_dict["W_enc"] = state_dict["W_enc"] * scale
            state_dict["b_enc"] = -(state_dict.pop("gate_mean") @ state_dict["W_enc"])
        super().process_state_dict_for_saving_inference(state_dict)


register_sae_class("mxd", MxD, MxDConfig)

register_sae_training_class("mxd", TrainingMxD, TrainingMxDConfig)
