"""Which experts are near each other: by their weights, and by when they fire."""

from __future__ import annotations

from collections.abc import Callable

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
    return _nearest(lambda part: rows[part] @ rows.T, experts, n)


def coactive(firings: Firings, n_tokens: int, n: int = 5) -> Ranked:
    """The n experts most often active on the same tokens as each, and the Jaccard index: tokens
    on which both fire over tokens on which either does."""
    shape = (len(firings.live), n_tokens)
    ones = np.ones(len(firings.row), np.float32)
    active = sparse.csr_array((ones, firings.token, firings.starts), shape=shape)
    by_token = sparse.csr_array(active.T)
    counts = firings.counts.astype(np.float32)

    def jaccard(part: slice) -> Tensor:
        both = (active[part] @ by_token).toarray()
        return torch.from_numpy(both / (counts[part, None] + counts - both))

    return [
        [(other, score) for other, score in of_expert if score > 0]
        for of_expert in _nearest(jaccard, firings.live, n)
    ]


def _nearest(
    similarity: Callable[[slice], Float[Tensor, "part experts"]],
    experts: Int[np.ndarray, "experts"],
    n: int,
) -> Ranked:
    """The n others most similar to each."""
    found: Ranked = []
    for first in range(0, len(experts), _PART):
        part = similarity(slice(first, first + _PART))
        own = torch.arange(len(part), device=part.device)
        part[own, first + own] = -torch.inf
        scores, places = part.topk(min(n, len(experts) - 1), dim=-1)
        for ids, of_expert in zip(experts[places.cpu().numpy()], scores.tolist(), strict=True):
            found.append(list(zip(ids.tolist(), of_expert, strict=True)))
    return found
