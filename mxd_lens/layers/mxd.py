"""The Mixture of Decoders: configuration, inference class and training class.

An MxD replaces an MLP or GLU by ``d_sae`` sparsely active experts, each a full-rank linear map
of the dense hidden units ``z`` (Oldfield et al. 2025, arXiv 2505.21364, section 2)::

    z = hidden units, see `HiddenUnits`                                 [.., d_hidden]
    a = topk_k(relu(x W_enc + b_enc))                   activations      [.., d_sae]
    y = sum_n a_n W_n^T z + b_dec,  W_n = W_shared diag(W_dec[n])
      = (a W_dec) * (z W_shared) + b_dec                               [.., d_out]

The gate and the experts have SAELens' names. The default recipe copies the hidden units from the
original MLP and centres the gate; others are in `mxd_lens.layers.mxd_meaningful` and
`mxd_lens.layers.mxd_paper`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.util import dtype_to_str
from scipy import sparse
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mxd_lens.layers.base import (
    SparseLayer,
    TrainingPairConfig,
    TrainingSparseLayer,
    has_hooks,
    pair_loss,
    picked_from,
    to_unit_norm_,
)
from mxd_lens.layers.codes import Codes, SparseCodes
from mxd_lens.layers.hidden import HiddenConfig, HiddenUnits
from mxd_lens.layers.kernels import gate_values, pre_activation_chunks, pre_activations
from mxd_lens.layers.mlp import MLPShape, MLPWeights, read_mlp


@dataclass(kw_only=True)
class MxDConfig(HiddenConfig):
    """Shape of an MxD: `HiddenConfig`'s fields, width of the hidden units, experts per token, and
    whether it holds W_write, see `MxD`."""

    d_hidden: int
    k: int = 32
    write_directions: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "mxd"


class MxD(SparseLayer, HiddenUnits):
    """A Mixture of Decoders for inference: an MLP to TransformerLens, an SAE to SAELens.

    Parameters (``cfg.dtype``): those of `HiddenUnits`; the experts' gate, W_enc [d_in, d_sae] and
    b_enc [d_sae]; W_dec [d_sae, d_out]; what all experts share, W_shared [d_hidden, d_out]; b_dec
    [d_out]. A buffer, if ``cfg.write_directions``, which has no part in the output: W_write [d_sae,
    d_out], what an activation of 1 says of the MLP's output, see `TrainingMxD`.

    Hook points, in the order they fire: ``hook_in`` (``hook_sae_input``), ``hook_sae_acts_pre``
    [.., d_sae], ``hook_codes`` (a `SparseCodes`), ``hook_sae_acts_post`` [.., d_sae],
    ``hook_experts`` (``a W_dec``) [.., d_out], those of `HiddenUnits`, ``hook_shared``
    (``z W_shared``) [.., d_out], ``hook_sae_recons``, ``hook_sae_output`` and ``hook_out``
    [.., d_out].

    Example::

        mxd = MxD.from_mlp(model.blocks[6].mlp)
        with mxd_lens.splice(model, {6: mxd}):
            model("The same model, by other means")
    """

    cfg: MxDConfig
    label: ClassVar[str] = "MxD"
    default_lr: ClassVar[float] = 3e-3
    sparse_hook: ClassVar[str] = "hook_experts"
    W_shared: nn.Parameter
    b_dec: nn.Parameter
    W_write: Tensor
    hook_experts: HookPoint
    hook_shared: HookPoint

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.hook_experts = HookPoint()
        self.hook_shared = HookPoint()
        self.setup()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the reference: linear layers uniform in +-1/sqrt(fan_in), W_shared and biases zero,
        rows of W_dec uniform and scaled to unit norm."""
        super().initialize_weights()
        self.initialize_hidden_units()
        self.W_shared = nn.Parameter(self._zeros(self.cfg.d_hidden, self.cfg.d_out))
        self.b_dec = nn.Parameter(self._zeros(self.cfg.d_out))
        self._initialize_write()

    def _initialize_write(self) -> None:
        if self.cfg.write_directions:
            self.register_buffer("W_write", self._zeros(self.cfg.d_sae, self.cfg.d_out))

    def combine(self, x: Tensor, codes: Codes) -> Tensor:
        experts = codes.decode(self.W_dec, unit_norm=self.unit_norm_decoder)
        experts = self.hook_experts(experts)
        shared = self.hook_shared(self.hidden(x) @ self.W_shared)
        return self.hook_sae_recons(experts * shared + self.b_dec)

    def expert_weights(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        """Expert n's linear map of the hidden units, ``W_n = W_shared diag(W_dec[n])``."""
        return self.W_shared * self.W_dec[n]

    @classmethod
    def width_for(cls, n_parameters: int, mlp: MLPShape) -> int:
        """As `Layer.width_for`; the gate's biases count, as in the reference."""
        return round((n_parameters - mlp.n_hidden) / (mlp.d_in + mlp.d_out + 1))

    @property
    def sample_size(self) -> int:
        return super().sample_size * (1 if self.cfg.write_directions else 4)

    @torch.no_grad()
    def steering_directions(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """W_write, if the layer has it; else what activations tell of the layer's output on x, by
        ridge regression: zero for an expert that does not fire there. It takes some 65,536 tokens
        to agree with what experts fire on as well as W_write does (docs/results.md)."""
        if self.cfg.write_directions:
            return self.W_write[units].clone()
        return self.regress(x.to(self.dtype))[units]

    @torch.no_grad()
    def regress(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "d_sae d_out"]:
        """Write directions by ridge regression of the layer's output on its activations at x, with
        a penalty as of one firing of each expert. Takes 16 d_sae^2 bytes, 0.8 GB for 7,000 experts,
        and seconds."""
        outputs, firings = [], []
        for number, part in enumerate(x.split(1024)):
            y, codes, _ = self.run_with_codes(part)
            token, unit, value = codes.firings()
            outputs.append(y.double().cpu())
            firings.append((token.cpu() + 1024 * number, unit.cpu(), value.double().cpu()))
        y = torch.cat(outputs)
        token, unit, value = (torch.cat(of_part).numpy() for of_part in zip(*firings, strict=True))
        acts = sparse.csr_array((value, (token, unit)), shape=(len(x), self.cfg.d_sae))
        read = sparse.hstack([acts, np.ones((len(x), 1))], format="csr")
        penalty = np.square(value).mean() if len(value) else 1.0
        fitted = Ridge(penalty, solver="cholesky", fit_intercept=False).fit(
            read, (y - y.mean(0)).numpy()
        )
        return torch.from_numpy(fitted.coef_[:, :-1].T.copy()).to(self.W_dec)

    @torch.no_grad()
    def effect_norms(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n"]:
        W_dec = self.W_dec[units]
        total = W_dec.new_zeros(len(W_dec))
        for tokens in x.to(W_dec).split(1024):
            shared = self.hidden(tokens) @ self.W_shared  # [tokens, d_out]
            total += (shared.square() @ W_dec.square().T).sqrt().sum(0)
        return total / len(x)

    @torch.no_grad()
    def weight_rows(self, units: Int[Tensor, "n"]) -> Float[Tensor, "n d_out"]:
        """``W_dec[n]`` times the norms of W_shared's columns: their inner products are those of
        the matrices ``W_shared diag(W_dec[n])``."""
        return self.W_dec[units].float() * self.W_shared.float().norm(dim=0)

    @torch.no_grad()
    def ranks(self) -> tuple[Int[np.ndarray, "d_sae"], Float[np.ndarray, "d_sae"]]:
        """Of ``W_shared diag(W_dec[n])``, see `Layer.ranks`.

        An expert has W_shared's rank where ``W_dec[n]`` has no zero (paper, lemma 1). With
        ``G = W_shared^T W_shared`` and ``c = W_dec[n]``, ``sum s^2 = c^2 diag(G)`` and
        ``sum s^4 = c^2 (G * G) c^2``: no effective rank needs a decomposition.
        """
        W_shared, square = self.W_shared.cpu().double(), self.W_dec.cpu().double().square()
        gram = W_shared.T @ W_shared
        second = square @ gram.diagonal()
        fourth = reduce(square @ gram.square() * square, "n d_out -> n", "sum")
        effective = torch.where(fourth > 0, second.square() / fourth, 0.0)
        rank = torch.linalg.matrix_rank(self.W_shared.float()).repeat(self.cfg.d_sae)
        for n in (self.W_dec == 0).any(-1).nonzero()[:, 0]:
            rank[n] = torch.linalg.matrix_rank(self.expert_weights(int(n)).float())
        return rank.cpu().numpy(), effective.numpy()

    @classmethod
    @torch.no_grad()
    def from_mlp(cls, mlp: nn.Module, d_sae: int = 1, k: int = 1) -> MxD:
        """The MxD that computes exactly what ``model.blocks[L].mlp`` does: ``a W_dec`` is 1, and
        the first k experts are always on, each a k-th of the layer. Raises as `read_mlp` does."""
        weights = read_mlp(mlp)
        dtype, device = dtype_to_str(weights.W_in.dtype), str(weights.W_in.device)
        shape: dict[str, Any] = asdict(weights.shape) | {"d_sae": d_sae, "k": k}
        mxd = cls(MxDConfig(**shape, dtype=dtype, device=device))
        mxd.copy_hidden_units(weights)
        mxd.W_shared.copy_(weights.W_out)
        mxd.b_dec.copy_(weights.b_out)
        mxd.W_enc.zero_()
        mxd.b_enc[:k] = 1 / k
        mxd.W_dec.fill_(1.0)
        return mxd


@dataclass(kw_only=True)
class TrainingMxDConfig(MxDConfig, TrainingPairConfig):
    """`MxDConfig`'s fields and the recipe's."""

    aux_loss_coefficient: float = 0.3
    """Weight of a linear reconstruction from the activations alone. It keeps experts from becoming
    idle where the dense part does nearly all the work."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.write_directions: bool = self.aux_loss_coefficient > 0


class TrainingMxD(MxD, TrainingSparseLayer):
    """The MxD as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``.

    The gate reads ``x - gate_mean``, has no bias, columns of unit norm and one learned scale,
    ``exp(log_gate_scale) * (x - gate_mean) W_enc``, so that every pre-activation has mean zero and
    no expert can always be on; it is saved as an ordinary gate. Rows of W_dec are centred and of
    unit norm.

    Beside MxD's parameters: ``gate_mean`` [d_in] (a buffer), ``log_gate_scale`` [], and the
    decoder of the auxiliary loss, W_aux [d_sae, d_out], which is saved as W_write, and b_aux
    [d_out].
    """

    cfg: TrainingMxDConfig  # type: ignore[assignment]
    gate_mean: Tensor
    log_gate_scale: nn.Parameter
    W_aux: nn.Parameter
    b_aux: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("gate_mean", self._zeros(self.cfg.d_in))
        self.log_gate_scale = nn.Parameter(self._zeros())
        self.b_enc.requires_grad_(False)
        self.normalize_decoder()

    def _initialize_write(self) -> None:
        if self.cfg.write_directions:
            self.W_aux = nn.Parameter(self._zeros(self.cfg.d_sae, self.cfg.d_out))
            self.b_aux = nn.Parameter(self._zeros(self.cfg.d_out))

    @property
    def W_write(self) -> Tensor:  # type: ignore[override]
        """W_aux, as the saved layer has it."""
        return self.W_aux

    @torch.no_grad()
    def init_from(
        self, mlp: MLPWeights, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]
    ) -> None:
        """Copy the MLP's hidden units; centre the gate on the sample's inputs, and scale it such
        that ``a W_dec`` has entries of size one. ValueError if the MLP does not fit the layer."""
        self.copy_hidden_units(mlp)
        self.gate_mean.copy_(x.mean(0))
        codes = self.gate(x.to(self.dtype))
        size = codes.square_norms().mean().div(self.cfg.d_out).sqrt()
        self.log_gate_scale.sub_(size.log())

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Norm rows of W_dec and columns of W_enc, before each step.

        Rows are centred first: what all of them share would make ``a W_dec`` constant and the
        choice of experts idle. Norming brings a little of it back, so repeated calls settle.
        """
        self.W_dec.sub_(self.W_dec.mean(0))
        to_unit_norm_(self.W_enc, 0)
        super().normalize_decoder()

    def gate(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes:
        scale = self.log_gate_scale.exp()
        gate, batch = (x - self.gate_mean, self.W_enc, self.b_enc), x.shape[:-1]
        chunk_size = self.gate_chunk_size
        if has_hooks(self.hook_sae_acts_pre):
            pre = pre_activations(*gate, unit_norm=True, chunk_size=chunk_size)
            scaled = self.hook_sae_acts_pre(pre * scale)
            # Scaling rounds: what no hook has edited is ranked as it is without hooks, before it.
            rank = torch.where(scaled == pre * scale, pre, scaled / scale)
            codes = self._pick(rank.reshape(-1, rank.shape[-1]).split(chunk_size), batch)
            return codes.with_values(picked_from(scaled, codes).relu())
        codes = self._pick(pre_activation_chunks(*gate, chunk_size=chunk_size), batch)
        chosen = codes.values, codes.indices
        values = gate_values(*chosen, *gate, counts=codes.counts, unit_norm=True)
        return codes.with_values(values * scale)

    def read_rows(
        self, units: Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n"]]:
        rows, bias = super().read_rows(units)
        scale = self.log_gate_scale.exp()
        return rows * scale, (bias - rows @ self.gate_mean) * scale

    def losses(self, y_hat: Tensor, y: Tensor, codes: Codes) -> dict[str, Tensor]:
        losses = super().losses(y_hat, y, codes)
        if self.cfg.write_directions:
            from_codes = codes.decode(self.W_aux) + self.b_aux
            losses["auxiliary_loss"] = self.cfg.aux_loss_coefficient * pair_loss(from_codes, y)
        return losses

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold gate_mean and scale into an ordinary gate; keep the auxiliary decoder as W_write."""
        if self.cfg.write_directions:
            state_dict["W_write"] = state_dict.pop("W_aux")
            del state_dict["b_aux"]
        scale = state_dict.pop("log_gate_scale").exp()
        state_dict["W_enc"] = state_dict["W_enc"] * scale
        state_dict["b_enc"] = -(state_dict.pop("gate_mean") @ state_dict["W_enc"])
        super().process_state_dict_for_saving_inference(state_dict)


register_sae_class("mxd", MxD, MxDConfig)
register_sae_training_class("mxd", TrainingMxD, TrainingMxDConfig)
