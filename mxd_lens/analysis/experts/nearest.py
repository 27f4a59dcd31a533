"""Which experts are near each other: by their weights, and by when they fire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from mxd_lens.analysis.experts.corpus import Firings
from mxd_lens.layers.layer import Layer

Ranked = list[list[tuple[int, float]]]
"""For each expert in question: ids and scores, best first."""

_PART = 128  # rows of similarities that exist at a time


@torch.no_grad()
def nearest_experts(layer: Layer, experts: Int[np.ndarray, "experts"], n: int = 5) -> Ranked:
    """The n of these experts with the linear maps nearest to each, and the cosine, see
    `Layer.weight_rows`."""
    units = torch.from_numpy(experts).to(layer.sae.device)
    rows = F.normalize(layer.weight_rows(units))
    return _nearest(_but_itself(lambda part: rows[part] @ rows.T), len(rows), experts, n)


def coactive(firings: Firings, n_tokens: int, n: int = 5, others: Firings | None = None) -> Ranked:
    """The n experts most often active on the same tokens as each, and the Jaccard index: tokens
    on which both fire over tokens on which either does.

    Args:
        n_tokens: that were read.
        others: when experts of another layer fire on these tokens, of which the n are; else they
            are of the same layer.
    """
    active, their = _active(firings, n_tokens), others or firings
    by_token = sparse.csr_array(_active(their, n_tokens).T)
    counts, their_counts = (of.counts.astype(np.float32) for of in (firings, their))

    def jaccard(part: slice) -> Tensor:
        both = (active[part] @ by_token).toarray()
        return torch.from_numpy(both / (counts[part, None] + their_counts - both))

    similarity = _but_itself(jaccard) if others is None else jaccard
    return [
        [(other, score) for other, score in of_expert if score > 0]
        for of_expert in _nearest(similarity, len(firings.live), their.live, n)
    ]


def coactive_by_chance(firings: Firings, n_tokens: int, others: Firings) -> float:
    """The mean over experts of the largest Jaccard index, see `coactive`, once the others' firings
    are moved on by half of the tokens, where they are as frequent and as bunched."""
    moved = replace(others, token=(others.token + n_tokens // 2) % n_tokens)
    return mean_best(coactive(firings, n_tokens, 1, moved))


def mean_best(found: Ranked) -> float:
    """The mean of the best scores, 0 where there is none."""
    return sum(of_expert[0][1] for of_expert in found if of_expert) / len(found)


def _active(firings: Firings, n_tokens: int) -> sparse.csr_array:
    """1 where an expert fires on a token, ``[live, n_tokens]``."""
    ones = np.ones(len(firings.row), np.float32)
    shape = (len(firings.live), n_tokens)
    return sparse.csr_array((ones, firings.token, firings.starts), shape=shape)


Similarity = Callable[[slice], Float[Tensor, "part experts"]]


def _but_itself(similarity: Similarity) -> Similarity:
    """The same, with none of an expert to itself."""

    def of_others(part: slice) -> Float[Tensor, "part experts"]:
        found = similarity(part)
        own = torch.arange(len(found), device=found.device)
        found[own, part.start + own] = -torch.inf
        return found

    return of_others


def _nearest(
    similarity: Similarity, n_rows: int, experts: Int[np.ndarray, "experts"], n: int
) -> Ranked:
    """For each row of similarities, the n experts with the largest, which are finite."""
    found: Ranked = []
    for first in range(0, n_rows, _PART):
        scores, places = similarity(slice(first, first + _PART)).topk(min(n, len(experts)), dim=-1)
        for ids, of_row in zip(experts[places.cpu().numpy()], scores.tolist(), strict=True):
            pairs = zip(ids.tolist(), of_row, strict=True)
            found.append([pair for pair in pairs if pair[1] > -torch.inf])
    return found
