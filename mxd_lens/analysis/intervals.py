"""How sure a number is that was measured on some sequences: the paired bootstrap over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Sums = Float[np.ndarray, "*resamples"]


def interval(
    statistic: Callable[..., Sums],
    *sums: Float[np.ndarray, "n_sequences"],
    n_resamples: int = 9999,
    seed: int = 0,
) -> list[float] | None:
    """95% percentile interval of a statistic of sums over sequences; None for a single one.

    Args:
        statistic: of the sums over all sequences that were drawn, each [n_resamples].
        sums: of each sequence. The same sequences are drawn for all of them.
    """
    table = np.asarray(sums, dtype=np.float64)
    n = table.shape[1]
    if n < 2:
        return None
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    drawn = statistic(*(counts @ of_sum for of_sum in table))
    return np.percentile(drawn, [2.5, 97.5]).tolist()


def worth(
    rows: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]]
) -> tuple[float | None, list[float] | None]:
    """What experts add: the dense control's CE increase minus the layer's, in nats per token, and
    its interval; None where they were measured on other sequences.

    Args:
        rows, controls: plain rows of results, one for each seed, whose means are compared.
    """
    if not _same_sequences(*rows, *controls):
        return None, None
    sums = _mean(controls, "ce_replaced"), _mean(rows, "ce_replaced"), _mean(rows, "tokens")
    spread = interval(lambda control, layer, tokens: (control - layer) / tokens, *sums)
    means = [np.mean([row["ce_increase"] for row in group]) for group in (controls, rows)]
    return float(means[0] - means[1]), spread


def increase_interval(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Of the mean CE increase over seeds, in nats per token; None where they were measured on other
    sequences. ``rows`` as in `worth`."""
    if not _same_sequences(*rows):
        return None
    sums = (_mean(rows, name) for name in ("ce_replaced", "ce_original", "tokens"))
    return interval(lambda layer, original, tokens: (layer - original) / tokens, *sums)


def _same_sequences(*rows: Mapping[str, Any]) -> bool:
    first, *others = (row["sequences"] for row in rows)
    return all(of[name] == first[name] for of in others for name in ("tokens", "ce_original"))


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> Float[np.ndarray, "n_sequences"]:
    return np.mean([row["sequences"][name] for row in rows], axis=0)
