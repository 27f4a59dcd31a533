"""The replacement model: a comparison's layers in place of their MLPs, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mxd_lens.fields import Count, Name, Seed, config
from mxd_lens.models.splice import splice
from mxd_lens.runs.claims import check_sources
from mxd_lens.runs.config import TrainConfig, finished_runs, values
from mxd_lens.runs.results import load_layer


@config
class Choice:
    """Which layers of a folder, one for each MLP."""

    architecture: Name | None = None
    """Which of RUN's layers, where it has several for one MLP."""
    k: Count | None = None
    """Likewise."""
    seed: Seed | None = None
    """Likewise."""

    @property
    def chosen(self) -> dict[str, Any]:
        """Arguments of `chosen_runs`."""
        return values(self, ("architecture", "k", "seed"))


def replace(
    model: Any,
    layers: str | Path | Mapping[int, nn.Module],
    *,
    architecture: str | None = None,
    k: int | None = None,
    seed: int | None = None,
) -> splice:
    """Put many layers in place of a model's MLPs, for good or as a context manager, see `splice`::

        with replace(model, "runs/all", architecture="mxd"):
            model.generate("The capital of France is")

    Args:
        layers: by MLP, or the folder of a run or comparison, on whose device they are loaded.
        architecture, k, seed: which of the folder's, if it has several for one MLP.

    Raises:
        ValueError: no such layers, several for one MLP, layers of another model, or see `splice`.
    """
    if isinstance(layers, Mapping):
        return splice(model, layers)
    runs = chosen_runs(layers, architecture=architecture, k=k, seed=seed)
    check_sources(runs, model)
    return splice(model, {run.layer: load_layer(run.layer_path, run.device) for run in runs})


def chosen_runs(
    folder: str | Path,
    *,
    architecture: str | None = None,
    k: int | None = None,
    seed: int | None = None,
) -> list[TrainConfig]:
    """The finished runs in a folder that are asked for, one for each MLP; ValueError if there are
    none, or several for one MLP."""
    asked = {"architecture": architecture, "k": k, "seed": seed}
    asked = {name: value for name, value in asked.items() if value is not None}
    every = finished_runs(Path(folder), one_mlp=False)
    runs = [run for run in every if asked.items() <= run.identity.items()]
    if not runs:
        said = ", ".join(sorted(map(str, every)))
        raise ValueError(f"{folder} has no layer of {asked}; it has {said}")
    of_first = [run for run in runs if [r.layer for r in runs].count(run.layer) > 1]
    if of_first:
        said = ", ".join(str(run) for run in of_first if run.layer == of_first[0].layer)
        raise ValueError(
            f"{folder} has several layers for one MLP ({said}): say which architecture, k or seed"
        )
    return sorted(runs, key=lambda run: run.layer)
