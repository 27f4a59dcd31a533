"""A text with the experts that fire on each of its tokens, as a notebook displays it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import SAE

from mxd_lens.analysis.experts.corpus import token_strings
from mxd_lens.data.reading import tokenize
from mxd_lens.layers import layer_of
from mxd_lens.models.site import Site
from mxd_lens.report.page import render
from mxd_lens.runs.results import Experts, read

N_LISTED = 12
"""Experts of a token that are listed, the strongest."""


@dataclass(frozen=True)
class Shown:
    """What `show` found. A notebook displays it: tokens darker the more strongly experts fire on
    them, and the experts of the one that is pointed at, clicked on or reached with the tab key."""

    where: str
    """Which layer, in which place."""
    tokens: list[str]
    """Of the text, without special ones; each with the space before it."""
    active: list[list[tuple[int, float]]]
    """For each token the experts that fire on it and their activations, the strongest first."""
    names: dict[int, str] = field(default_factory=dict)
    """Of experts."""
    expert: int | None = None
    """The one by whose activation tokens are marked; None: by the sum of all."""

    @property
    def marks(self) -> list[float]:
        """How strongly each token is marked: from 0 to 1, which is the strongest of the text."""
        total = [
            sum(value for unit, value in of_token if self.expert in (None, unit))
            for of_token in self.active
        ]
        largest = max(total, default=0.0)
        return [value / largest if largest else 0.0 for value in total]

    def _repr_html_(self) -> str:
        """HTML that needs no script and asks nothing of the network."""
        lines = [
            {
                "token": token,
                "mark": mark,
                "n": len(active),
                "experts": [(unit, self.names.get(unit, ""), v) for unit, v in active[:N_LISTED]],
            }
            for token, mark, active in zip(self.tokens, self.marks, self.active, strict=True)
        ]
        by = "all experts" if self.expert is None else self._called(self.expert)
        return render("tokens.html", where=self.where, by=by, lines=lines, expert=self.expert)

    def _called(self, expert: int) -> str:
        return f"expert #{expert} {self.names.get(expert, '')}".rstrip()


@torch.no_grad()
def show(
    model: Any,
    sae: SAE[Any],
    text: str,
    *,
    expert: int | None = None,
    experts: str | Path | None = None,
) -> Shown:
    """Mark the tokens of a text by the experts that fire on them; the last line of a notebook's
    cell displays that::

        mxd_lens.show(model, mxd, "The cat sat on the mat", experts="runs/demo/.../experts.json")

    Args:
        model: the language model that `sae.cfg.metadata` names the hooks of.
        text: read as far as the model's context reaches, after a BOS token.
        expert: mark by its activation, not by the sum of all.
        experts: an ``experts.json`` of the layer, for the experts' names.

    Raises:
        ValueError: a layer without experts, an expert that it has not, a hook that metadata or
            model lack, a text without a token that is not special, or no such file, or one of
            another layer.
    """
    layer, d_sae = layer_of(sae), int(sae.cfg.d_sae)
    if not layer.has_experts:
        raise ValueError(f"a {layer.label} has no experts to show")
    if expert is not None and not 0 <= expert < d_sae:
        raise ValueError(f"expert={expert}: the layer has experts 0 to {d_sae - 1}")
    site = Site.of(model, sae)
    names = {} if experts is None else _names(Path(experts), site, d_sae)
    tokens = tokenize(model, text, int(model.cfg.n_ctx))
    ids = tokens[site.non_special(tokens)].tolist()
    if not ids:
        raise ValueError(f"there is no token to show in {text!r}")
    x = site.read(tokens[None], (site.hook_in,))[site.hook_in]
    firings = layer.codes(x.to(sae.device)).firings()
    token, unit = (part.cpu().numpy() for part in firings[:2])
    value = firings[2].cpu().float().numpy()
    order = np.lexsort((-value, token))
    starts = np.searchsorted(token[order], np.arange(1, len(ids)))
    pairs = [*zip(unit[order].tolist(), value[order].tolist(), strict=True)]
    ends = [0, *starts.tolist(), len(pairs)]
    active = [pairs[start:end] for start, end in pairwise(ends)]
    where = f"{layer.label} in place of {site.hook_out} of {sae.cfg.metadata.model_name}"
    return Shown(where, token_strings(model.tokenizer, ids), active, names, expert)


def _names(path: Path, site: Site, d_sae: int) -> dict[int, str]:
    """Of the experts that a file describes."""
    found = read(path, Experts)
    if found is None:
        raise ValueError(f"there is no {path}: `mxd-lens experts` writes it")
    if (found.hook_name, found.d_sae) != (site.hook_in, d_sae):
        raise ValueError(
            f"{path} is of {found.d_sae} experts at {found.hook_name}, this layer has {d_sae} at "
            f"{site.hook_in}"
        )
    return {of_expert.id: of_expert.name for of_expert in found.experts}
