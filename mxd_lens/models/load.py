"""Language models, loaded by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

from mxd_lens.demo.models import load_smollm2_bridge, load_smollm2_hooked

ModelClass = Literal["TransformerBridge", "HookedTransformer"]

ModelDtype = Literal["float32", "bfloat16"]

DTYPES: dict[ModelDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DEMO_MODEL = "demo:smollm2"


def load_model(
    name: str,
    model_class: ModelClass = "TransformerBridge",
    device: str = "cpu",
    *,
    dtype: ModelDtype = "float32",
) -> Any:
    """A language model SAEs can be attached to, weights unprocessed; ValueError if there is none.

    Args:
        name: a model on the Hugging Face hub, a local folder with one, or ``demo:smollm2``,
            SmolLM2-135M-Instruct from the package index.
        model_class: a SAETransformerBridge, or the older HookedSAETransformer, which reads no
            folder.
        device: or "auto", which spreads a bridge over several.
        dtype: of its weights.
    """
    bridged = model_class == "TransformerBridge"
    if device == "auto" and (name == DEMO_MODEL or not bridged):
        raise ValueError("device auto: only a TransformerBridge from the hub or a folder spreads")
    if name == DEMO_MODEL:
        load = load_smollm2_bridge if bridged else load_smollm2_hooked
        return load(device=device, dtype=DTYPES[dtype])
    if not bridged and (Path(name) / "config.json").exists():
        raise ValueError(
            f"a HookedTransformer loads models by their hub name, not the folder {name!r}: "
            "load it as a TransformerBridge"
        )
    try:
        if bridged:
            where = {"device_map": device} if device == "auto" else {"device": device}
            return SAETransformerBridge.boot_transformers(name, dtype=DTYPES[dtype], **where)
        return HookedSAETransformer.from_pretrained_no_processing(
            name, device=device, dtype=DTYPES[dtype]
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name!r}: {error}") from error


def bfloat16_is_fast(device: str | None = None) -> bool:
    """True if autocast to bfloat16 saves time: not on a CPU that has no instructions for it, where
    a product takes 40 times as long as in float32. By default of CUDA where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cpu":
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return device.startswith("cuda") and torch.cuda.is_bf16_supported()
