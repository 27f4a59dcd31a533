"""sparsify's transcoders: a folder for each hook point.

``layers.6.mlp/cfg.json`` and ``layers.6.mlp/sae.safetensors``, as `SparseCoder.save_to_disk` in
`sparsify/sparse_coder.py` of github.com/EleutherAI/sparsify writes them (package eai-sparsify)::

    a = topk_k(relu(x encoder.weight^T + encoder.bias))      encoder.weight [num_latents, d_in]
    y = a W_dec + b_dec + x W_skip^T                         W_dec [num_latents, d_in]

W_skip [d_in, d_in] is there with ``skip_connection``. Of an SAE, not of a transcoder, b_dec is also
subtracted from x. Decoders are saved as they are used, whatever ``normalize_decoder`` says.
With ``gram_lookup``, y lacks a table of means that is saved elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from sae_lens.saes.sae import SAE
from typing_extensions import NotRequired, TypedDict

from mxd_lens.fields import Count, sentence
from mxd_lens.formats.foreign import build, of_mlp, read_tensors
from mxd_lens.models.load import ModelClass

CONFIG_FILENAME = "cfg.json"
WEIGHTS_FILENAME = "sae.safetensors"


class Config(TypedDict):
    """cfg.json, as far as a transcoder's output depends on it."""

    k: Count
    transcode: Literal[True]
    activation: Literal["topk"]
    skip_connection: NotRequired[bool]
    gram_lookup: NotRequired[Literal[False]]


def read_sparsify(
    path: str | Path, model_name: str | None = None, model_class: ModelClass = "TransformerBridge"
) -> dict[int, SAE[Any]]:
    """The transcoders of MLPs that sparsify has saved, by MLP.

    Args:
        path: the folder of a hook point, or one with such folders in it, as a run or a repository
            on the hub has them.
        model_name: by default what the run's ``config.json`` says, if it is there.
        model_class: see `mxd_lens.formats.read_layers`.

    Returns:
        ``topk_transcoder`` or ``topk_skip_transcoder``.

    Raises:
        ValueError: files that are missing, damaged, or of another format; an SAE, or another
            activation than top-k; hook points that are no MLPs, or several layers for one MLP.
    """
    path = Path(path)
    found = [path] if (path / CONFIG_FILENAME).exists() else sorted(_folders(path))
    if not found:
        raise ValueError(
            f"{path} holds no layer: neither a {CONFIG_FILENAME} of sparsify's, nor folders with "
            "one, nor circuit-tracer's config.yaml"
        )
    layers: dict[int, SAE[Any]] = {}
    for folder in found:
        number = _mlp(folder)
        if number in layers:
            raise ValueError(
                f"{path} holds several layers for MLP {number}: name one of its folders"
            )
        name = model_name or _model_name(folder)
        layers[number] = _read_layer(folder, of_mlp(number, name, model_class))
    return dict(sorted(layers.items()))


def _folders(path: Path) -> list[Path]:
    return [file.parent for depth in ("*", "*/seed*") for file in path.glob(f"{depth}/cfg.json")]


def _hook_point(folder: Path) -> Path:
    """The folder that is named by the hook point: there may be one for each seed below it."""
    folder = folder.resolve()
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def _mlp(folder: Path) -> int:
    name = _hook_point(folder).name
    found = re.search(r"(?:^|\.)(\d+)\.mlp$", name)
    if found is None:
        raise ValueError(
            f"{folder} belongs to the hook point {name}, which is no MLP: name a folder such as "
            "layers.6.mlp"
        )
    return int(found[1])


def _model_name(folder: Path) -> str | None:
    path = _hook_point(folder).parent / "config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _read_layer(folder: Path, metadata: Any) -> SAE[Any]:
    config = _read_config(folder / CONFIG_FILENAME)
    skip = config.get("skip_connection", False)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    names |= {"W_skip": "W_skip"} if skip else {}
    path = folder / WEIGHTS_FILENAME
    weights = {names[name]: weight for name, weight in read_tensors(path, names).items()}
    weights["W_enc"] = weights["W_enc"].mT if weights["W_enc"].ndim > 1 else weights["W_enc"]
    architecture = "topk_skip_transcoder" if skip else "topk_transcoder"
    return build(path, architecture, weights, metadata, k=config["k"])


def _read_config(path: Path) -> Config:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no cfg.json of sparsify's ({error})") from error
    if isinstance(found, dict) and found.get("transcode") and "activation" not in found:
        raise ValueError(
            f"{path} is of a sparsify from before February 2025, which subtracted b_dec from a "
            "transcoder's input, as later ones do not: say which you mean by saving it again with "
            "a later one"
        )
    try:
        return TypeAdapter(Config).validate_python(found)
    except ValidationError as error:
        said = sentence(error.errors()[:1])
        raise ValueError(f"{path} is no transcoder of sparsify's with top-k ({said})") from None
