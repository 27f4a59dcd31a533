"""Language models, loaded by name."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jaxtyping import Int
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxd_lens.demo.models import DEMO_MODELS

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

    A HookedTransformer from a folder computes what transformers does, or is refused. It needs a
    TransformerLens before 4.

    Args:
        name: a model on the Hugging Face hub, a local folder with one, or from the package index
            ``demo:smollm2``, SmolLM2-135M-Instruct, or ``demo:gemma3``, Gemma-3-270M.
        model_class: a SAETransformerBridge, or the older HookedSAETransformer.
        device: or "auto", which spreads a bridge over several.
        dtype: of its weights.
    """
    bridged = model_class == "TransformerBridge"
    if device == "auto" and (name in DEMO_MODELS or not bridged):
        raise ValueError("device auto: only a TransformerBridge from the hub or a folder spreads")
    source = str(DEMO_MODELS[name]()) if name in DEMO_MODELS else name
    try:
        if bridged:
            where = {"device_map": device} if device == "auto" else {"device": device}
            return SAETransformerBridge.boot_transformers(source, dtype=DTYPES[dtype], **where)
        if (Path(source) / "config.json").exists():
            return _load_hooked(Path(source), device, DTYPES[dtype])
        return _hooked_class().from_pretrained_no_processing(
            source, device=device, dtype=DTYPES[dtype]
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name!r}: {error}") from error


def _hooked_class() -> Any:
    """SAELens' HookedSAETransformer; ValueError if what is installed has none."""
    try:
        from sae_lens import HookedSAETransformer
    except ImportError as error:
        raise ValueError(
            f"TransformerLens {version('transformer-lens')} with SAELens {version('sae-lens')} has "
            "no HookedTransformer: leave model_class at TransformerBridge, or install "
            "'transformer-lens<4'"
        ) from error
    return HookedSAETransformer


def _load_hooked(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The model in a folder; ValueError if TransformerLens cannot convert it, or its logits are
    others than transformers'."""
    hooked_class = _hooked_class()
    original: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        model = _converted(hooked_class, original, tokenizer)
    except Exception as error:  # TransformerLens raises many kinds for what it does not know
        why = f"TransformerLens cannot convert it ({' '.join(str(error).split())[:200]})"
        raise ValueError(f"{why}: load it as a TransformerBridge") from error
    _check_logits(model, original)
    model.cfg.model_name, model.cfg.tokenizer_name = folder.name, str(folder)
    model.to(dtype, print_details=False)
    return model.to(device, print_details=False)


def _converted(hooked_class: Any, original: Any, tokenizer: Any) -> Any:
    """The same in float32 on the CPU, nothing folded or centred."""
    from transformer_lens.loading_from_pretrained import (
        get_pretrained_model_config,
        get_pretrained_state_dict,
    )

    config = original.config
    if config.model_type == "gpt2":
        config.n_ctx = config.n_positions  # which files of before transformers 5 have
    # TransformerLens guesses the architecture from the names in a path, if there is llama in it.
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        cfg = get_pretrained_model_config(
            folder, hf_cfg=config.to_dict(), device="cpu", dtype=torch.float32
        )
        weights = get_pretrained_state_dict(folder, cfg, original)
    window = getattr(config, "sliding_window", None)
    if window and window < cfg.n_ctx and not cfg.use_local_attn:
        raise ValueError(f"its attention reaches {window} tokens back, a HookedTransformer's all")
    model = hooked_class(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        weights,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


@torch.no_grad()
def _check_logits(model: Any, original: Any) -> None:
    """Raise ValueError if the two predict differently, in float32 on the CPU."""
    rng = torch.Generator().manual_seed(0)
    size = 1, min(model.cfg.n_ctx, 128)
    tokens: Int[Tensor, "1 pos"] = torch.randint(original.config.vocab_size, size, generator=rng)
    expected = original(tokens).logits
    difference = float((model(tokens) - expected).abs().max() / expected.abs().max())
    if not difference < 1e-4:
        raise ValueError(
            "as a HookedTransformer it predicts something else than in transformers, logits differ "
            f"by {difference:.1%} of the largest: load it as a TransformerBridge"
        )


def bfloat16_is_fast(device: str | None = None) -> bool:
    """True if autocast to bfloat16 saves time: not on a CPU that has no instructions for it, where
    a product takes 40 times as long as in float32. By default of CUDA where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cpu":
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return device.startswith("cuda") and torch.cuda.is_bf16_supported()
