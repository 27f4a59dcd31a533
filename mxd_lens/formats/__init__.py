"""Layers in other tools' files: one file for each format, which reads it and, if it can, writes it.

`read_layers` finds out which format a path holds. Whatever a format cannot say of a layer, or a
layer not of what a file holds, is a ValueError: nothing is read or written approximately.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE

from mxd_lens.formats.circuit_tracer import CONFIG_FILENAME, read_circuit_tracer
from mxd_lens.formats.reference import read_reference
from mxd_lens.formats.sparsify import read_sparsify
from mxd_lens.models.load import ModelClass


def read_layers(
    path: str | Path, model_name: str | None = None, model_class: ModelClass = "TransformerBridge"
) -> dict[int, SAE[Any]]:
    """The layers that other tools have saved, by MLP, ready for `mxd_lens.splice` or `replace`.

    Args:
        path: a checkpoint of the paper's code (`read_reference`), a folder of circuit-tracer's
            (`read_circuit_tracer`) or of sparsify's (`read_sparsify`).
        model_name: of the language model; by default what the files say.
        model_class: of the model that the layers are for, whose hooks their metadata names; those
            of the paper's code are for a HookedTransformer.

    Raises:
        ValueError: neither of these, or see there.
    """
    path = Path(path)
    if path.is_file():
        return read_reference(path, model_name)
    if (path / CONFIG_FILENAME).exists():
        return read_circuit_tracer(path, model_name, model_class)
    if (path / SAE_WEIGHTS_FILENAME).exists():
        raise ValueError(f"{path} is in SAELens' format already: SAE.load_from_disk loads it")
    if path.is_dir():
        return read_sparsify(path, model_name, model_class)
    raise ValueError(f"there is no {path}")
