"""Whose a folder is: one run's, with one model and one text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from mxd_lens.data.text import Text
from mxd_lens.files import claim, read_json, write_json
from mxd_lens.runs.config import COMPARISON_FILENAME, RunConfig, TrainConfig, settings
from mxd_lens.runs.fingerprint import model_fingerprint, text_fingerprint

SOURCES_FILENAME = "sources.json"
"""Which model and text a run was begun with."""


def claim_folder(cfg: TrainConfig, *, write: bool = True) -> None:
    """Write the configuration down, or compare it with the one that is there; ValueError if it is
    another, or the folder holds something else."""
    writes = ("layer", "checkpoints", "results.json", "results.html", SOURCES_FILENAME)
    writes = (*writes, COMPARISON_FILENAME)
    claim(Path(cfg.output), RUNNER_CFG_FILENAME, settings(cfg), writes, write=write)


def check_sources(
    runs: Sequence[RunConfig], model: Any = None, dataset: Text | None = None
) -> None:
    """Write down which model and text some runs have, or compare them with what is written;
    ValueError if one has changed since a run was begun."""
    sources = {} if model is None else {"model": model_fingerprint(model)}
    if dataset is not None:
        sources["text"] = text_fingerprint(dataset)
    for run in runs:
        path = Path(run.output) / SOURCES_FILENAME
        known = read_json(path, dict[str, str]) or {}
        names = {"model": run.model, "text": run.dataset}
        for source, print_now in sources.items():
            if known.get(source, print_now) != print_now:
                raise ValueError(
                    f"{run.output} was begun with another {source} than {names[source]!r} is "
                    "now: restore it, or choose another folder"
                )
        if sources.keys() - known.keys():
            write_json(path, known | sources)
