"""MOLT: a sparse mixture of low-rank linear transforms of the MLP's input.

    a = topk_k(relu(x W_enc + b_enc))                               [.., d_sae]
    y = sum_n a_n x W_read[n]^T W_dec[n] + b_dec                    [.., d_out]

``W_read[n]`` [rank, d_in] and ``W_dec[n]`` [rank, d_out] are V_n and U_n^T of Lindsey et al. 2025,
"Sparse mixtures of linear transforms" (transformer-circuits.pub/2025/bulk-update). Unlike there,
the k largest gates are active, as in all layers of a comparison, and nothing penalises them; and
all transforms have one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from sae_lens.registry import register_sae_class, register_sae_training_class
from torch import Tensor, nn

from mxd_lens.layers.base import PairConfig, SparseLayer, TrainingPairConfig, TrainingSparseLayer
from mxd_lens.layers.codes import Codes
from mxd_lens.layers.mlp import MLPShape

_N_FIRING = 32  # tokens over which what a transform writes is averaged


@dataclass(kw_only=True)
class MOLTConfig(PairConfig):
    """Shape of a MOLT: `PairConfig`'s fields and k, transforms active per token."""

    k: int = 32
    rank: int = 32
    """Of every transform: by default that of half of them in open implementations, whose ranks are
    512 to 32 at widths around 1,000, each half as large as the one before and twice as frequent.
    `width_for` counts on the default: with another rank choose d_sae, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    @classmethod
    def architecture(cls) -> str:
        return "molt"


class MOLT(SparseLayer):
    """A MOLT for inference: an MLP to TransformerLens, an SAE to SAELens.

    Parameters (``cfg.dtype``): W_enc [d_in, d_sae], b_enc [d_sae], W_read [d_sae, rank, d_in],
    W_dec [d_sae, rank, d_out], b_dec [d_out]. W_dec starts at zero.

    Hook points, in the order they fire: ``hook_in`` (``hook_sae_input``), ``hook_sae_acts_pre``
    [.., d_sae], ``hook_codes`` (a `SparseCodes`), ``hook_sae_acts_post`` [.., d_sae],
    ``hook_sae_recons``, ``hook_sae_output`` and ``hook_out`` [.., d_out].
    """

    cfg: MOLTConfig
    label: ClassVar[str] = "MOLT"
    default_lr: ClassVar[float] = 1e-2
    multiple_of: ClassVar[int] = 1
    W_read: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        self.W_read = nn.Parameter(self._uniform(cfg.d_sae, cfg.rank, cfg.d_in))
        self.W_dec = nn.Parameter(self._zeros(cfg.d_sae, cfg.rank, cfg.d_out))
        self.b_dec = nn.Parameter(self._zeros(cfg.d_out))

    def combine(self, x: Tensor, codes: Codes) -> Tensor:
        """All transforms are applied, which takes two dense products as large as those of a
        transcoder with as many parameters."""
        read = (x @ self.W_read.flatten(0, 1).T).unflatten(-1, (-1, self.cfg.rank))
        gated = read * codes.to_dense().to(read.dtype)[..., None]
        return self.hook_sae_recons(gated.flatten(-2) @ self.W_dec.flatten(0, 1) + self.b_dec)

    def write_rows(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """``x W_read[n]^T W_dec[n]``."""
        read = torch.einsum("ni,nri->nr", x, self.W_read[units])
        return torch.einsum("nr,nro->no", read, self.W_dec[units])

    @property
    def dense_width(self) -> int:
        return self.cfg.d_sae * self.cfg.rank

    @classmethod
    def width_for(cls, n_parameters: int, mlp: MLPShape) -> int:
        """As `Layer.width_for`, with the gate's biases, at the default rank."""
        of_transform = MOLTConfig.rank * (mlp.d_in + mlp.d_out)
        return round(n_parameters / (of_transform + mlp.d_in + 1))

    def transform(self, n: int) -> Float[Tensor, "d_in d_out"]:
        """Transform n, ``W_read[n]^T W_dec[n]``."""
        return self.W_read[n].T @ self.W_dec[n]

    @torch.no_grad()
    def steering_directions(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """``x W_read[n]^T W_dec[n]``, its mean over the 32 tokens of x with the largest gate."""
        x = x.to(self.dtype)
        n = min(_N_FIRING, len(x))
        firing = [(x @ self.W_enc[:, part]).topk(n, dim=0).indices for part in units.split(64)]
        mean = torch.cat([x[of_part].mean(0) for of_part in firing])
        read = torch.einsum("ni,nri->nr", mean, self.W_read[units])
        return torch.einsum("nr,nro->no", read, self.W_dec[units])

    @torch.no_grad()
    def effect_norms(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n"]:
        # The norm of h W_dec[n] is that of h R^T, where W_dec[n]^T = Q R.
        R = _triangle(self.W_dec[units].float()).to(self.dtype)
        read_by = R @ self.W_read[units]  # [n, rank, d_in]
        total = torch.zeros(len(units), device=self.device)
        for tokens in x.to(read_by).split(256):
            read = (tokens @ read_by.flatten(0, 1).T).unflatten(-1, read_by.shape[:2])
            total += read.float().norm(dim=-1).sum(0)
        return (total / len(x)).to(self.dtype)

    @torch.no_grad()
    def weight_rows(self, units: Int[Tensor, "n"]) -> Float[Tensor, "n n"]:
        """Vectors with the inner products of the transforms ``W_read[n]^T W_dec[n]`` as vectors,
        which themselves are d_in d_out long: rows of a square root of the products' matrix."""
        read, write = self.W_read[units].float(), self.W_dec[units].float()
        inner = []
        for of_read, of_write in zip(read.split(16), write.split(16), strict=True):
            products = of_read.flatten(0, 1) @ read.flatten(0, 1).T
            products *= of_write.flatten(0, 1) @ write.flatten(0, 1).T
            products = rearrange(products, "(m r) (n s) -> m n (r s)", r=self.cfg.rank, n=len(read))
            inner.append(products.sum(-1))
        values, vectors = torch.linalg.eigh(torch.cat(inner).cpu().double())
        return (vectors * values.clamp_min(0).sqrt()).to(read)

    @torch.no_grad()
    def ranks(self) -> tuple[Int[np.ndarray, "d_sae"], Float[np.ndarray, "d_sae"]]:
        """Of the transforms, see `Layer.ranks`. With ``W_read[n]^T = Q R`` and ``W_dec[n]^T = P S``
        the singular values are those of ``R S^T`` [rank, rank]."""
        R, S = (_triangle(W.cpu().double()) for W in (self.W_read, self.W_dec))
        s = torch.linalg.svdvals(R @ S.mT)
        width = max(self.cfg.d_in, self.cfg.d_out)
        least = width * torch.finfo(torch.float32).eps * s[:, :1]  # as matrix_rank in float32
        fourth = s.pow(4).sum(-1)
        effective = torch.where(fourth > 0, s.square().sum(-1).square() / fourth, 0.0)
        return (s > least).sum(-1).numpy(), effective.numpy()


def _triangle(W: Float[Tensor, "n rank d"]) -> Float[Tensor, "n s rank"]:
    """R of ``W[n]^T = Q R``, whose columns have the inner products of W[n]'s rows."""
    return torch.linalg.qr(W.mT, mode="r").R


@dataclass(kw_only=True)
class TrainingMOLTConfig(MOLTConfig, TrainingPairConfig):
    """`MOLTConfig`'s fields; the recipe has none."""


class TrainingMOLT(MOLT, TrainingSparseLayer):
    """The MOLT as `SAETrainer` trains it, on batches ``cat([mlp_in, mlp_out], -1)``."""

    cfg: TrainingMOLTConfig  # type: ignore[assignment]
    unit_norm_decoder: ClassVar[bool] = False


register_sae_class("molt", MOLT, MOLTConfig)
register_sae_training_class("molt", TrainingMOLT, TrainingMOLTConfig)
