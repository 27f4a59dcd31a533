"""Going through the order of a text without the language model, as a run that resumes does.

    python tests/benchmarks/bench_text.py [n_tokens, of raw text a tenth]

The demo's Wikipedia with SmolLM2's tokenizer, raw and tokenized before.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, PretokenizeRunner, PretokenizeRunnerConfig
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer

from mxd_lens import load_text, split_documents
from mxd_lens.data.activations import Reader, activations_store
from mxd_lens.data.stream import Part, Stream
from mxd_lens.demo.models import smollm2_dir
from mxd_lens.models.site import Site
from mxd_lens.ranks import Ranks

SIZES = {"context_size": 128, "batch_size": 4096, "lm_batch_size": 32}


def tiny_model() -> HookedSAETransformer:
    """One that nobody runs, with SmolLM2's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 8, "d_head": 8, "d_mlp": 8, "n_ctx": 128}
    cfg = HookedTransformerConfig(**sizes, d_vocab=len(tokenizer), act_fn="relu", device="cpu")
    return HookedSAETransformer(cfg, tokenizer)


def pass_by(site: Site, dataset: Any, n_tokens: int) -> None:
    start = time.perf_counter()
    documents, _ = split_documents(dataset, 1000)
    print(f"  held out after {time.perf_counter() - start:.2f} s")
    store = activations_store([site], documents, autocast_lm=False, **SIZES)
    where = {"device": "cpu", "dtype": torch.float32}
    reader = Reader(store, [site], [[0]], ranks=Ranks(), **where)
    start, first = time.perf_counter(), n_tokens // SIZES["batch_size"]
    Stream(reader, [Part(0, 0)], first)
    seconds = time.perf_counter() - start
    print(
        f"  {first * SIZES['batch_size']:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.0f}/s"
    )


def main(n_tokens: int) -> None:
    site = Site.at(tiny_model(), 0)
    text = load_text("demo:wikipedia")
    print("raw text")
    pass_by(site, text, n_tokens // 10)
    with TemporaryDirectory() as folder:
        text.to_json(Path(folder) / "text.jsonl")
        made = PretokenizeRunnerConfig(
            tokenizer_name=str(smollm2_dir()),
            dataset_path="json",
            data_files=[str(Path(folder) / "text.jsonl")],
            num_proc=1,
            save_path=str(Path(folder) / "tokens"),
        )
        start = time.perf_counter()
        PretokenizeRunner(made).run()
        tokens = load_text(str(Path(folder) / "tokens"))
        assert isinstance(tokens, Dataset)
        print(f"tokenized before, {len(tokens):,} rows in {time.perf_counter() - start:.0f} s")
        pass_by(site, tokens, n_tokens)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000_000)
