"""Which units are active on which tokens, and how much: the codes between a gate and a decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mxd_lens.layers.kernels import keep_unit_norm, to_dense, token_of, weighted_row_sum

Firings: TypeAlias = tuple[Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n"]]


@dataclass
class SparseCodes:
    """The active units of each token: k for all, or ragged.

    A layer's ``hook_codes`` carries this; it has what TransformerLens' caches ask of an
    activation (`detach`, `to`, `shape`, `size`, indexing the batch), and what SAELens' trainer
    counts firings by (`bool`, `float`, `sum`).

    Args:
        values: activations [*batch, k]; ragged: [n], one token after the other. Never negative;
            a zero is an entry that is not active.
        indices: units, of the same shape.
        d_sae: how many units there are.
        counts: ragged: how many of the n entries each token has, [*batch].
    """

    values: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]
    d_sae: int
    counts: Int[Tensor, "*batch"] | None = None
    ndim: ClassVar[int] = 1

    @property
    def shape(self) -> torch.Size:
        """[*batch, d_sae]: that of the activations written out."""
        batch = self.values.shape[:-1] if self.counts is None else self.counts.shape
        return torch.Size([*batch, self.d_sae])

    def decode(
        self, table: Float[Tensor, "d_sae d"], *, unit_norm: bool = False
    ) -> Float[Tensor, "*batch d"]:
        """``a @ table``.

        Args:
            unit_norm: as `weighted_row_sum`'s.
        """
        return weighted_row_sum(
            self.values, self.indices, table, counts=self.counts, unit_norm=unit_norm
        )

    def to_dense(self) -> Float[Tensor, "*batch d_sae"]:
        """The activations written out."""
        return to_dense(self.values, self.indices, self.d_sae, counts=self.counts)

    def square_norms(self) -> Float[Tensor, "*batch"]:
        """``sum_n a_n^2`` of each token."""
        square = self.values.square()
        return square.sum(-1) if self.counts is None else self.with_values(square).sum(-1)

    def with_values(self, values: Tensor) -> SparseCodes:
        """The same units with other activations."""
        return SparseCodes(values, self.indices, self.d_sae, self.counts)

    def for_counting(self) -> Any:
        """What SAELens' trainer counts firings of."""
        return self.detach()

    def bool(self) -> SparseCodes:
        """1 where a unit is active."""
        return self.with_values(self.values.detach() > 0)

    def float(self) -> SparseCodes:
        """Of float32."""
        return self.with_values(self.values.float())

    def sum(self, dim: int) -> Float[Tensor, "d_sae"] | Float[Tensor, "*batch"]:
        """Over the tokens (0 or -2), for each unit, or over the units (-1), for each token."""
        values = self.values.flatten()
        if dim == -1:
            at, n, shape = token_of(self.indices, self.counts), self.shape[:-1].numel(), self.shape
            return values.new_zeros(n).index_add_(0, at, values).view(shape[:-1])
        if dim not in (0, -2):
            raise ValueError(f"sum over dimension {dim}: it is 0 or -2, tokens, or -1, units")
        return values.new_zeros(self.d_sae).index_add_(0, self.indices.flatten(), values)

    def firings(self) -> Firings:
        """Token (of the flattened batch), unit and activation wherever a unit is active."""
        values = self.values.detach().flatten()
        active = values > 0
        token = token_of(self.indices, self.counts)
        return token[active], self.indices.flatten()[active], values[active]

    def detach(self) -> SparseCodes:
        return self.with_values(self.values.detach())

    def to(self, device: torch.device | str | None) -> SparseCodes:
        return replace(
            self,
            values=self.values.to(device),
            indices=self.indices.to(device),
            counts=None if self.counts is None else self.counts.to(device),
        )

    def dim(self) -> int:
        """1: there is no axis of positions that a cache could slice."""
        return self.ndim

    def size(self, axis: int) -> int:
        return self.shape[axis]

    def __getitem__(self, at: int | slice | tuple[int | slice, ...]) -> SparseCodes:
        """Those of a part of the batch."""
        if self.counts is None:
            return replace(self, values=self.values[at], indices=self.indices[at])
        of_part = torch.zeros_like(self.counts, dtype=torch.bool)
        of_part[at] = True
        kept = of_part.flatten()[token_of(self.indices, self.counts)]
        return replace(
            self, values=self.values[kept], indices=self.indices[kept], counts=self.counts[at]
        )


@dataclass
class DenseCodes:
    """Activations that are written out: they are hooked, or an SAE makes no others."""

    values: Float[Tensor, "*batch d_sae"]

    def decode(
        self, table: Float[Tensor, "d_sae d"], *, unit_norm: bool = False
    ) -> Float[Tensor, "*batch d"]:
        """``a @ table``, see `SparseCodes.decode`."""
        return self.values.to(table.dtype) @ (keep_unit_norm(table) if unit_norm else table)

    def to_dense(self) -> Float[Tensor, "*batch d_sae"]:
        """The activations."""
        return self.values

    def for_counting(self) -> Any:
        """As `SparseCodes.for_counting`: the batch flattened."""
        return rearrange(self.values.detach(), "... d_sae -> (...) d_sae")

    def firings(self) -> Firings:
        """Token (of the flattened batch), unit and activation wherever a unit is active."""
        values = self.for_counting()
        token, unit = (values > 0).nonzero(as_tuple=True)
        return token, unit, values[token, unit]


Codes: TypeAlias = SparseCodes | DenseCodes
