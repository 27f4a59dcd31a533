"""How sure a number is that was measured on some sequences: the paired bootstrap over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    row: Mapping[str, Any], control: Mapping[str, Any]
) -> tuple[float | None, list[float] | None]:
    """What experts add: the dense control's CE increase minus the layer's, in nats per token, and
    its interval; None where they were measured on other sequences.

    Args:
        row, control: plain rows of results.
    """
    ours, theirs = row["sequences"], control["sequences"]
    if any(ours[name] != theirs[name] for name in ("tokens", "ce_original")):
        return None, None
    sums = theirs["ce_replaced"], ours["ce_replaced"], ours["tokens"]
    spread = interval(lambda control, layer, tokens: (control - layer) / tokens, *sums)
    return control["ce_increase"] - row["ce_increase"], spread
