"""The paper's run on paper: 480 million tokens, a layer for each MLP of Llama-3.2-3B.

    python tests/benchmarks/bench_plan.py [n_tokens]

The order of all batches is decided, as training would, on indices; weights are on the meta device.
What is printed: the plan for some machines, and the memory that the order of the tokens takes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch

from mxd_lens.data.activations import Pass, buffer_size
from mxd_lens.data.stream import Mixer
from mxd_lens.layers.mlp import MLPShape
from mxd_lens.runs.config import ManyConfig
from mxd_lens.runs.train import plan_for

N_LAYERS = 28
SHAPE = MLPShape(d_in=3072, d_out=3072, d_hidden=8192, act_fn="silu", gated=True)
CONFIG = ManyConfig(
    model="meta-llama/Llama-3.2-3B",
    dataset="Skylion007/openwebtext",
    output="runs/llama",
    layers=["all"],
    architectures=["mxd_paper"],
    expansion=32,
    training_tokens=480_000_000,
    batch_size=4096,
    dtype="bfloat16",
    autocast=True,
)


def site(layer: int) -> Any:
    hooks = {"hook_in": f"blocks.{layer}.mlp.hook_in", "hook_out": f"blocks.{layer}.mlp.hook_out"}
    model = SimpleNamespace(cfg=SimpleNamespace(d_model=SHAPE.d_in))
    return SimpleNamespace(mlp=SimpleNamespace(shape=SHAPE), layer=layer, model=model, **hooks)


def passes() -> Iterator[Pass]:
    """Of texts with a BOS token each, which is no row."""
    tokens = torch.zeros(CONFIG.lm_batch_size, CONFIG.context_size, dtype=torch.long)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 0] = False
    for number in count():
        yield Pass(number, tokens, kept.flatten())


def peak() -> float:
    """GiB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(n_tokens: int) -> None:
    sites = {layer: site(layer) for layer in range(N_LAYERS)}
    for world, free in ((1, 80), (8, 80), (8, 140)):
        plan = plan_for(CONFIG.runs(N_LAYERS), sites, world, free=free * 2**30)
        print(f"{world} x {free} GiB: {plan}")
    size = buffer_size(CONFIG.batch_size, CONFIG.lm_batch_size, CONFIG.context_size)
    store = SimpleNamespace(
        n_batches_in_buffer=size // CONFIG.context_size,
        training_context_size=CONFIG.context_size,
        store_batch_size_prompts=CONFIG.lm_batch_size,
        train_batch_size_tokens=CONFIG.batch_size,
    )
    reader: Any = SimpleNamespace(store=store, dtype=torch.bfloat16, device="cpu", d_pair=0)
    mixer = Mixer(passes(), reader, [], seed=0)
    before, start = peak(), time.perf_counter()
    for _ in range(n_tokens // CONFIG.batch_size):
        mixer.next_slots()
    print(
        f"order of {n_tokens:,} tokens: {time.perf_counter() - start:.0f} s, "
        f"{peak() - before:.2f} GiB; the whole process: {peak():.2f} GiB"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else CONFIG.training_tokens)
