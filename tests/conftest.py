"""Tiny random language models and layers, built offline."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.training.sae_trainer import SAETrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformer_lens import HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mxd_lens import CompareConfig, TrainConfig, train
from mxd_lens.startup import Interrupted

SENTENCES = ["the cat sat on the mat", "a dog ran after the cat", "one fish saw a dog"]
N_VOCAB, D_MODEL, D_MLP, N_LAYERS = 24, 16, 32, 3
TOKENS = {"vocab_size": N_VOCAB, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def randomise(module: nn.Module, size: float = 0.3) -> None:
    """Every parameter away from its initial value, biases and norms' weights included."""
    for parameter in module.parameters():
        parameter.add_(size * torch.randn_like(parameter))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, N_VOCAB, (2, 7))


def make_hooked(**fields: Any) -> HookedSAETransformer:
    model = HookedSAETransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=D_MODEL,
            d_head=8,
            n_heads=2,
            d_mlp=D_MLP,
            d_vocab=N_VOCAB,
            n_ctx=32,
            seed=0,
            device="cpu",
            **fields,
        )
    )
    randomise(model)
    return model


@pytest.fixture
def tiny_hooked() -> HookedSAETransformer:
    return make_hooked(
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
    )


@pytest.fixture
def tiny_hooked_mlp() -> HookedSAETransformer:
    # Rotary, for TransformerLens' cached generation goes wrong with learned positions.
    return make_hooked(
        act_fn="gelu_new", normalization_type="LN", positional_embedding_type="rotary"
    )


@pytest.fixture
def tiny_hooked_attn_only() -> HookedSAETransformer:
    return make_hooked(attn_only=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def save(model: PreTrainedModel, folder: Path) -> Path:
    randomise(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A Llama with biases in its MLP, as Hugging Face saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **TOKENS,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        mlp_bias=True,
        pad_token_id=2,
    )
    return save(LlamaForCausalLM(config), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        **TOKENS,
        n_embd=D_MODEL,
        n_inner=D_MLP,
        n_layer=N_LAYERS,
        n_head=2,
        n_positions=32,
    )
    return save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def tiny_bridge(llama_folder) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(llama_folder))


@pytest.fixture
def tiny_bridge_gpt2(gpt2_folder) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(gpt2_folder))


@pytest.fixture(params=["tiny_hooked", "tiny_bridge"])
def lm(request, llama_folder) -> Any:
    """A tiny model, by the name of its fixture, with a tokenizer."""
    model = request.getfixturevalue(request.param)
    if model.tokenizer is None:
        model.set_tokenizer(AutoTokenizer.from_pretrained(llama_folder))
    return model


@pytest.fixture
def plain_bridge(llama_folder) -> TransformerBridge:
    """Unlike SAELens' subclass, this one knows the hook points' other names."""
    return TransformerBridge.boot_transformers(str(llama_folder))


@pytest.fixture
def plain_bridge_gpt2(gpt2_folder) -> TransformerBridge:
    return TransformerBridge.boot_transformers(str(gpt2_folder))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """``edit_json(path, **fields)``: overwrite these fields of a JSON file."""

    def edit(path: Path, **fields: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "after", "one", "fish", "saw"]


@pytest.fixture
def documents() -> Dataset:
    """Text a tiny model can read."""
    rng = random.Random(0)
    return Dataset.from_dict(
        {"text": [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for _ in range(200)]}
    )


@pytest.fixture
def text(documents, tmp_path) -> str:
    """A file of these documents."""
    documents.to_json(tmp_path / "text.jsonl")
    return str(tmp_path / "text.jsonl")


TINY_RUN = {
    "model": "tiny",
    "layer": 1,
    "dataset": "tiny",
    "training_tokens": 32 * 40,
    "batch_size": 32,
    "context_size": 8,
    "lm_batch_size": 4,
    "heldout_documents": 40,
    "device": "cpu",
}


TINY_RUNS: dict[str, Any] = {n: value for n, value in TINY_RUN.items() if n != "layer"}
TINY_RUNS |= {"layers": [1]}
"""The same, of a `ManyConfig`."""


@pytest.fixture
def make_config(tmp_path) -> Callable[..., TrainConfig]:
    """``make_config(**fields)``: a run of 40 steps on `documents`."""

    def make(**fields: Any) -> TrainConfig:
        layer = {"output": str(tmp_path / "run"), "k": 3, "d_sae": 12}
        return TrainConfig(**(TINY_RUN | layer | fields))

    return make


@pytest.fixture
def make_compare(tmp_path) -> Callable[..., CompareConfig]:
    """``make_compare(**fields)``: a comparison of such runs."""

    def make(**fields: Any) -> CompareConfig:
        defaults = {"output": str(tmp_path / "compare"), "k": [2, 3], "n_sequences": 4}
        return CompareConfig(**(TINY_RUNS | defaults | fields))

    return make


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], Any]], AbstractContextManager[None]]:
    """``with at_step(n, action)``: do it within the n-th training step."""

    @contextmanager
    def doing(n: int, action: Callable[[], Any]) -> Iterator[None]:
        step = SAETrainer.step

        def stepping(self, batch):
            if self.n_training_steps == n:
                action()
            return step(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(SAETrainer, "step", stepping)
            yield

    return doing


@pytest.fixture
def stopped(tiny_bridge, documents, make_config, at_step) -> Callable[..., TrainConfig]:
    """``stopped(**fields)``: the configuration of a run that has been stopped at step 17."""

    def stop(**fields: Any) -> TrainConfig:
        cfg = make_config(**fields)
        with at_step(17, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(Interrupted):
            train(cfg, tiny_bridge, documents)
        return cfg

    return stop
