"""Attribution graphs: which nodes of a prompt add how much to which others, and to a target.

An edge is what one node adds to another's pre-activation, or to a target, in the prompt's local
replacement model, see `mxd_lens.analysis.graphs.local`: a node's edges and its bias add up to its
pre-activation. Nodes are active experts (units), errors, embeddings and targets (Ameisen et al.
2025, transformer-circuits.pub/2025/attribution-graphs/methods.html).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.graphs.local import Backward, LocalModel

MAX_LOGITS, LOGIT_SHARE = 10, 0.95
"""Targets where none are named: as many of the likeliest tokens as have this probability together,
at most so many (as circuit-tracer)."""


@dataclass
class Targets:
    """Logits after a prompt, each less the mean over the vocabulary, or the difference of two.

    A logit is before any soft cap.
    """

    names: list[str]
    tokens: list[int]
    against: int | None
    """The token whose logit is subtracted from that of the only other one."""
    probability: Float[Tensor, "n"]
    """Of these tokens."""
    weight: Float[Tensor, "n"]
    """How much each counts in the influence of nodes."""
    vectors: Float[Tensor, "n d_model"]
    bias: Float[Tensor, "n"]
    """The target is ``final . vectors[i] + bias[i]``, final being what the unembedding reads."""

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, final: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """Their values."""
        return final @ self.vectors.T + self.bias


@torch.no_grad()
def targets_of(
    local: LocalModel, target: str | int | None = None, against: str | int | None = None
) -> Targets:
    """What a graph explains.

    Args:
        target: a token, as text or by its id; by default the likeliest tokens, see `MAX_LOGITS`.
        against: the token whose logit is subtracted.

    Raises:
        ValueError: a text is not one token, both are the same, or against without a target.
    """
    model, n = local.model, len(local.logits)
    probability = local.logits.float().softmax(-1)
    if target is None:
        if against is not None:
            raise ValueError(f"against={against!r} needs a target that it is subtracted from")
        top = probability.topk(min(MAX_LOGITS, n))
        enough = int((top.values.cumsum(0) < LOGIT_SHARE).sum()) + 1
        tokens = top.indices[:enough].tolist()
    else:
        tokens = [_token(model, target, n)]
    W_U, b_U = model.W_U.detach(), model.b_U.detach()
    chosen = torch.tensor(tokens, device=W_U.device)
    other = None
    if against is None:
        vectors, bias = W_U[:, chosen].T - W_U.mean(1), b_U[chosen] - b_U.mean()
        names = [_text(model, token) for token in tokens]
    else:
        other = _token(model, against, n)
        if other == tokens[0]:
            raise ValueError(f"target and against are the same token, {target!r}")
        vectors = (W_U[:, chosen[0]] - W_U[:, other])[None]
        bias = (b_U[chosen[0]] - b_U[other])[None]
        names = [f"{_text(model, tokens[0])} - {_text(model, other)}"]
    of_tokens = probability[chosen.to(probability.device)].cpu()
    weight = of_tokens if target is None else torch.ones(len(tokens))
    vectors, bias = vectors.to(local.final), bias.to(local.final)
    return Targets(names, tokens, other, of_tokens, weight, vectors, bias)


def _token(model: Any, token: str | int, n_vocab: int) -> int:
    if isinstance(token, int):
        if not 0 <= token < n_vocab:
            raise ValueError(f"no token {token}: the vocabulary has {n_vocab:,}")
        return token
    ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        parts = [_text(model, i) for i in ids]
        raise ValueError(f"{token!r} is not one token but {len(ids)}: {parts}")
    return ids[0]


def _text(model: Any, token: int) -> str:
    return model.tokenizer.decode([token])


@dataclass
class Graph:
    """The attribution graph of a prompt.

    Nodes are numbered: ``n_units`` active units, then ``len(layers)`` times n_pos errors, n_pos
    embeddings, and the targets. ``edges[i]`` are those into unit i, ``edges[n_units + j]`` into
    target j, from all that are no targets: in the sense of the arrow, column to row.
    """

    tokens: Int[Tensor, "pos"]
    words: list[str]
    """The tokens as text."""
    layers: list[int]
    """MLPs, each of which has an error at every position."""
    layer: Int[Tensor, "n_units"]
    position: Int[Tensor, "n_units"]
    unit: Int[Tensor, "n_units"]
    activation: Float[Tensor, "n_units"]
    source: Int[Tensor, "n_units"]
    """Numbers of these units among the local model's sources."""
    n_active: int
    """Active units, of which these are the most influential."""
    targets: Targets
    edges: Float[Tensor, "n_rows n_sources"]
    bias: Float[Tensor, "n_rows"]
    """What the model's biases add, and the constants of linearised dense paths."""
    unlisted: Float[Tensor, "n_rows"]
    """What active units that are no nodes add."""
    value: Float[Tensor, "n_rows"]
    """Pre-activations, and the targets' values."""

    @property
    def n_units(self) -> int:
        return len(self.unit)

    @property
    def n_nodes(self) -> int:
        return self.edges.shape[1] + len(self.targets)

    @property
    def incompleteness(self) -> float:
        """The largest difference between a node's value and what its edges and biases add up to,
        in units of the value: rounding, if the model is as linear as it should be."""
        found = self.edges.sum(1) + self.bias + self.unlisted
        size = self.edges.abs().sum(1) + self.bias.abs() + self.unlisted.abs()
        return float(((found - self.value).abs() / size.clamp_min(1e-12)).max())


def attribute(
    model: Any,
    layers: Mapping[int, SAE[Any]],
    tokens: Int[Tensor, "pos"],
    target: str | int | None = None,
    against: str | int | None = None,
    *,
    max_nodes: int = 4096,
    batch: int = 64,
) -> tuple[Graph, LocalModel]:
    """The graph of a prompt, and the local replacement model that it is of.

    Args:
        layers: by MLP, see `LocalModel`.
        tokens: the prompt, special tokens included.
        target, against: see `targets_of`.
        max_nodes: active units that become nodes, the most influential ones: those that matter are
            found as the graph grows, a few batches at a time.
        batch: targets of one pass backward.

    Raises:
        ValueError: see `LocalModel` and `targets_of`; or the model is not linear with attention
            patterns and norms held, so its edges would be wrong.
    """
    local = LocalModel(model, layers, tokens)
    targets = targets_of(local, target, against)
    n_units, n_nodes, n_targets = local.n_units, min(max_nodes, local.n_units), len(targets)
    backward = Backward(local, min(batch, max(n_nodes, n_targets)))
    batch = backward.batch
    final = torch.full((n_targets,), -1), torch.full((n_targets,), len(local.tokens) - 1)
    into_targets = torch.cat(
        [
            backward(*(part[i : i + batch] for part in (*final, targets.vectors)))
            for i in range(0, n_targets, batch)
        ]
    )
    edges = into_targets.new_zeros(n_nodes, local.n_sources)
    reads = torch.cat([s.reads.cpu() for s in local.standins.values()])
    row = torch.full((n_units,), -1)  # of each unit that has one
    with tqdm(total=n_nodes, desc="Tracing back") as progress:
        done = 0
        while done < n_nodes:
            n = min(n_nodes - done, 4 * batch)
            if n_nodes < n_units:
                influence = _so_far(into_targets, edges[:done], row, targets.weight)
                influence[row >= 0] = -1
                pending = influence.topk(n).indices
            else:
                pending = torch.arange(done, done + n)
            pending = pending.sort().values  # a pass ends at the last layer of its targets
            for some in pending.split(batch):
                found = backward(local.layer[some], local.position[some], reads[some])
                edges[done : done + len(some)] = found
                row[some] = torch.arange(done, done + len(some))
                done += len(some)
                progress.update(len(some))
    source = (row >= 0).nonzero()[:, 0]
    edges = torch.cat([edges[row[source]], into_targets])
    listed = torch.cat([source, torch.arange(n_units, local.n_sources)])
    all_of_them = edges.sum(1)
    edges = edges[:, listed] if n_nodes < n_units else edges
    graph = Graph(
        tokens=local.tokens.cpu(),
        words=[_text(model, token) for token in local.tokens.tolist()],
        layers=list(local.standins),
        layer=local.layer[source],
        position=local.position[source],
        unit=local.unit[source],
        activation=local.activation[source],
        source=source,
        n_active=n_units,
        targets=targets,
        edges=edges,
        bias=_biases(local, targets)[torch.cat([source, n_units + torch.arange(n_targets)])],
        unlisted=all_of_them - edges.sum(1),
        value=torch.cat([local.activation[source], targets.of(local.final).cpu()]).to(edges),
    )
    rounding = 0.05 if local.embedded.dtype.itemsize < 4 else 1e-3
    if graph.incompleteness > rounding:
        raise ValueError(
            f"edges and biases add up to something else than a node's value, by "
            f"{graph.incompleteness:.1%}: with attention patterns and norms held, this model is "
            "not linear"
        )
    return graph, local


def _biases(local: LocalModel, targets: Targets) -> Float[Tensor, "n_units_and_targets"]:
    """Pre-activations and targets where no source writes anything."""
    reads, final = local.affine(local.embedded.new_zeros(1, local.n_sources))
    pre = [
        torch.einsum("nd,nd->n", reads[number][0, s.position], s.reads) + s.read_bias
        for number, s in local.standins.items()
    ]
    return torch.cat([of_layer.cpu() for of_layer in [*pre, targets.of(final[0, -1])]])


def _so_far(
    into_targets: Float[Tensor, "n_targets n_sources"],
    edges: Float[Tensor, "n_rows n_sources"],
    row: Int[Tensor, "n_units"],
    weight: Float[Tensor, "n_targets"],
) -> Float[Tensor, "n_units"]:
    """Influence of units along the edges that are known yet."""
    known = (row >= 0).nonzero()[:, 0]
    return influence(into_targets, edges[row[known]], known, weight)[: len(row)]


def normalised(edges: Float[Tensor, "n_rows n_sources"]) -> Float[Tensor, "n_rows n_sources"]:
    """Absolute values, each row's sum 1."""
    size = edges.abs()
    return size / size.sum(1, keepdim=True).clamp_min(1e-10)


def influence(
    into_targets: Float[Tensor, "n_targets n_sources"],
    into_units: Float[Tensor, "n_units n_sources"],
    units: Int[Tensor, "n_units"],
    weight: Float[Tensor, "n_targets"],
) -> Float[Tensor, "n_sources"]:
    """How much of the targets comes by way of each source: with A the matrix of `normalised`
    edges, ``weight (A + A^2 + ...) = weight ((I - A)^-1 - I)``.

    A power of A is zero beyond the number of layers.

    Args:
        units: of each row of ``into_units``, its number among the sources.
    """
    A = normalised(into_units)
    step = weight.to(A) @ normalised(into_targets)
    total = step.clone()
    while step[units].any():
        step = step[units] @ A
        total += step
    return total
