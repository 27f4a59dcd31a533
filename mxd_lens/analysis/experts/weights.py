"""What the weights say of experts: ranks, and which are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from scipy import sparse
from torch import Tensor

from mxd_lens.analysis.experts.corpus import Firings
from mxd_lens.layers.mxd import MxD

Ranked = list[list[tuple[int, float]]]

"""For each expert in question: ids and scores, best first."""


def spectrum(sae: SAE[Any], n: int) -> Float[Tensor, "rank"]:
    """Singular values, largest first, of the linear map of expert n.

    An MxD's maps the hidden units to the output, ``W_shared diag(W_dec[n])``; a transcoder's or an
    SAE's maps the input to the output, ``W_enc[:, n] W_dec[n]``, and has one.
    """
    if isinstance(sae, MxD):
        return torch.linalg.svdvals(sae.expert_weights(n).detach().float())
    return (sae.W_enc[:, n].detach().norm() * sae.W_dec[n].detach().norm()).float()[None]


@torch.no_grad()
def ranks(sae: SAE[Any]) -> tuple[Int[np.ndarray, "d_sae"], Float[np.ndarray, "d_sae"]]:
    """Rank and effective rank of every expert's linear map, as in `spectrum`.

    An MxD's expert has W_shared's rank where ``W_dec[n]`` has no zero (paper, lemma 1), and is
    computed otherwise. The effective rank is the participation ratio of the squared singular
    values ``s^2``, ``(sum s^2)^2 / sum s^4``: m if m are equal and the others zero. With
    ``G = W_shared^T W_shared`` and ``c = W_dec[n]``, ``sum s^2 = c^2 diag(G)`` and
    ``sum s^4 = c^2 (G * G) c^2``, so that no expert needs a decomposition.
    """
    if not isinstance(sae, MxD):
        zero = (sae.W_enc.norm(dim=0) * sae.W_dec.norm(dim=1) == 0).cpu().numpy()
        return np.where(zero, 0, 1), np.where(zero, 0.0, 1.0)
    W_shared, square = sae.W_shared.cpu().double(), sae.W_dec.cpu().double().square()
    gram = W_shared.T @ W_shared
    second, fourth = square @ gram.diagonal(), (square @ gram.square() * square).sum(-1)
    effective = torch.where(fourth > 0, second.square() / fourth, 0.0)
    rank = torch.linalg.matrix_rank(sae.W_shared.float()).repeat(sae.cfg.d_sae)
    for n in (sae.W_dec == 0).any(-1).nonzero()[:, 0]:
        rank[n] = torch.linalg.matrix_rank(sae.expert_weights(int(n)).float())
    return rank.cpu().numpy(), effective.numpy()


@torch.no_grad()
def alike(sae: SAE[Any], experts: Int[np.ndarray, "experts"], n: int = 5) -> Ranked:
    """The n of these experts with the weights most alike to each, and the cosine.

    For an MxD the cosine of ``W_shared diag(W_dec[n])`` as vectors, which is that of
    ``W_dec[n]`` times the norms of W_shared's columns; otherwise that of rows of W_dec.
    """
    rows = sae.W_dec[torch.from_numpy(experts).to(sae.device)].float()
    rows = F.normalize(rows * sae.W_shared.float().norm(dim=0) if isinstance(sae, MxD) else rows)
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
    """The n others most similar to each, 512 rows of the similarities at a time."""
    found: Ranked = []
    for first in range(0, len(experts), 512):
        part = similarity(slice(first, first + 512))
        own = torch.arange(len(part), device=part.device)
        part[own, first + own] = -torch.inf
        scores, places = part.topk(min(n, len(experts) - 1), dim=-1)
        for ids, of_expert in zip(experts[places.cpu().numpy()], scores.tolist(), strict=True):
            found.append(list(zip(ids.tolist(), of_expert, strict=True)))
    return found
