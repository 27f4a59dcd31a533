"""What a training step costs, against the arithmetic it cannot do without.

    make bench [DEVICE=cuda]

Three runs of everything, medians and spread; the last line is one JSON object. The floor is the
gate's forward product and the dense part's forward and backward, in the precision of the step.
Where `eai-sparsify` is installed (`.venv/bin/pip install eai-sparsify`), its transcoders run too.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor
from torch.utils.benchmark import Timer

from mxd_lens.layers import answers, config_class
from mxd_lens.layers.mxd import MxD

try:
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]
except ImportError:
    SparseCoder = SparseCoderConfig = None

BATCH, D_MODEL, D_SAE, K, D_HIDDEN = 2048, 576, 16_118, 32, 1536
N_UNITS = 32 * D_MODEL  # of the transcoders and the SAE with as many parameters
DEVICE = os.environ.get("DEVICE", "cpu")
N_RUNS = 3

Step = Callable[[], None]


def dense_loss(sae: MxD, x: Tensor, y: Tensor) -> Tensor:
    """The layer as the paper's reference computes it, every activation in memory."""
    pre = torch.einsum("bi,in->bn", x, sae.W_enc) + sae.b_enc
    values, indices = pre.topk(sae.cfg.k, dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    gate = F.silu(torch.einsum("bi,ih->bh", x, sae.W_hidden_gate) + sae.b_hidden_gate)
    hidden = gate * (torch.einsum("bi,ih->bh", x, sae.W_hidden) + sae.b_hidden)
    shared = torch.einsum("bh,ho->bo", hidden, sae.W_shared)
    y_hat = torch.einsum("bn,no->bo", acts, sae.W_dec) * shared + sae.b_dec
    return ((y_hat - y).square() / y.norm(dim=-1, keepdim=True)).mean()


def new_layer(architecture: str, **shape: Any) -> Any:
    """A layer in training."""
    cfg = config_class(architecture)(device=DEVICE, **shape)
    return answers(architecture).training_class()(cfg)


def new_mxd(architecture: str, d: int = D_MODEL, n: int = D_SAE, k: int = K, h: int = D_HIDDEN):
    """An MxD with no weight at zero."""
    sae = new_layer(architecture, d_in=d, d_out=d, d_hidden=h, d_sae=n, k=k)
    torch.nn.init.normal_(sae.W_shared, std=0.02)
    return sae


def forward_and_backward(sae: Any, batch: Tensor, autocast: bool = False) -> Step:
    """A step of the layer, without the optimizer's."""
    step_input = TrainStepInput(batch, {}, None, 0, False)

    def step() -> None:
        with precision(autocast):
            loss = sae.training_forward_pass(step_input).loss
        loss.backward()
        sae.zero_grad()

    return step


def precision(autocast: bool) -> Any:
    """bfloat16 where autocast finds it safe, or float32."""
    return torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext()


def sparsify_steps(x: Tensor, y: Tensor) -> dict[str, Step]:
    """Steps of sparsify's transcoders, where it is installed."""
    if SparseCoder is None or SparseCoderConfig is None:
        return {}
    coder_class, coder_config = SparseCoder, SparseCoderConfig

    def step_of(skip: bool) -> Step:
        cfg = coder_config(num_latents=N_UNITS, k=K, transcode=True, skip_connection=skip)
        coder = coder_class(D_MODEL, cfg, device=DEVICE)
        torch.nn.init.normal_(coder.W_dec, std=0.02)

        def step() -> None:
            coder(x, y).fvu.backward()
            coder.zero_grad()

        return step

    return {
        "sparsify's transcoder": step_of(skip=False),
        "sparsify's skip transcoder": step_of(skip=True),
    }


def floor_of(sae: MxD, x: Tensor, autocast: bool = False) -> Step:
    """What no exact implementation can avoid."""

    def step() -> None:
        with precision(autocast):
            with torch.no_grad():
                _ = x @ sae.W_enc
            hidden = F.silu(x @ sae.W_hidden_gate) * (x @ sae.W_hidden)
            out = hidden @ sae.W_shared
        out.sum().backward()
        sae.zero_grad()

    return step


def milliseconds(steps: dict[str, Step], seconds: float = 4.0) -> dict[str, list[float]]:
    """For each step, the medians of N_RUNS runs, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(N_RUNS):
        for name, step in steps.items():
            timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
            times[name].append(timer.blocked_autorange(min_run_time=seconds).median * 1e3)
    return times


def peak_memory() -> tuple[float, float]:
    """(bytes that training steps take at most, what they are meant to), in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory).result()


def _peak_memory() -> tuple[float, float]:
    batch = torch.randn(BATCH, 2 * D_MODEL, device=DEVICE)
    (
        batch[:, :D_MODEL] @ torch.randn(D_MODEL, 8, device=DEVICE, requires_grad=True)
    ).sum().backward()
    before = _most_memory()
    sae = new_mxd("mxd_paper")
    optimiser = torch.optim.Adam(sae.parameters(), fused=True)
    step_input = TrainStepInput(batch, {}, None, 0, False)
    for _ in range(3):
        sae.training_forward_pass(step_input).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    n_parameters = sum(p.numel() for p in sae.parameters())
    return _most_memory() - before, 4 * (4 * n_parameters + 1.5 * BATCH * D_SAE)


def _most_memory() -> float:
    """The most memory, in bytes, that has been in use at a time."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    in_use = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return in_use if sys.platform == "darwin" else in_use * 1024


def show(title: str, times: dict[str, list[float]], floors: dict[str, str]) -> None:
    """A table; floors names the row each is a multiple of."""
    print(f"\n{title}\n\n| forward + backward | ms, median | ms, range | over its floor |")
    print("|---|---|---|---|")
    for name, runs in times.items():
        over = median(runs) / median(times[floors[name]])
        print(f"| {name} | {median(runs):.0f} | {min(runs):.0f}-{max(runs):.0f} | {over:.2f} |")


def main() -> None:
    torch.manual_seed(0)
    used, bound = peak_memory()  # first: a new process starts from its parent's high-water mark
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads,", end=" ")
    print(f"{platform.machine()}, {platform.processor() or platform.system()}")
    batch = torch.randn(BATCH, 2 * D_MODEL, device=DEVICE)
    x, y = batch.split(D_MODEL, dim=-1)
    mxd, default = new_mxd("mxd_paper"), new_mxd("mxd")
    shape: dict[str, Any] = {"d_in": D_MODEL, "d_sae": N_UNITS, "k": K}
    transcoder = new_layer("topk_transcoder", d_out=D_MODEL, **shape)
    skip = new_layer("topk_skip_transcoder", d_out=D_MODEL, **shape)
    topk = TopKTrainingSAE(TopKTrainingSAEConfig(device=DEVICE, **shape))
    torch.testing.assert_close(
        mxd.training_forward_pass(TrainStepInput(batch, {}, None, 0, False)).loss,
        dense_loss(mxd, x, y),
        rtol=1e-4,
        atol=1e-6,
    )

    def dense() -> None:
        dense_loss(mxd, x, y).backward()
        mxd.zero_grad()

    steps = {
        "floor": floor_of(mxd, x),
        "MxD": forward_and_backward(mxd, batch),
        "MxD, default recipe": forward_and_backward(default, batch),
        "MxD, dense einsum": dense,
        "SAELens' TopK SAE": forward_and_backward(topk, x),
        "transcoder": forward_and_backward(transcoder, batch),
        "skip transcoder": forward_and_backward(skip, batch),
        **sparsify_steps(x, y),
        "floor, bfloat16": floor_of(mxd, x, autocast=True),
        "MxD, bfloat16": forward_and_backward(mxd, batch, autocast=True),
        "MxD, default recipe, bfloat16": forward_and_backward(default, batch, autocast=True),
    }
    times = milliseconds(steps)
    floors = {name: "floor, bfloat16" if "bfloat16" in name else "floor" for name in times}
    sizes = f"B {BATCH}, d {D_MODEL}, N {D_SAE} or {N_UNITS} units, k {K}, GLU H {D_HIDDEN}"
    show(sizes, times, floors)

    def with_k(k: int) -> Step:
        step = forward_and_backward(mxd, batch)

        def run() -> None:
            mxd.cfg.k = k
            step()

        return run

    by_k = {f"k = {k}": with_k(k) for k in (8, 32, 128, 256)}
    times_k = milliseconds({"floor": floor_of(mxd, x), **by_k}, 2.0)
    show("The same MxD by k", times_k, dict.fromkeys(times_k, "floor"))

    big = new_mxd("mxd_paper", d=2048, n=32_768, k=64, h=8192)
    wide = torch.randn(BATCH, 4096, device=DEVICE)
    times_big = milliseconds(
        {"floor": floor_of(big, wide[:, :2048]), "MxD": forward_and_backward(big, wide)}, 2.0
    )
    sizes = f"B {BATCH}, d 2048, N 32768, k 64, GLU H 8192"
    show(sizes, times_big, dict.fromkeys(times_big, "floor"))

    print(
        f"\nPeak memory of a step with Adam: {used / 1e6:,.0f} MB; weights, gradient, two moments "
    )
    print(f"and one and a half buffers [B, N] are {bound / 1e6:,.0f} MB")

    at = {name: median(runs) for name, runs in times.items()}
    print()
    print(
        json.dumps(
            {
                "step_over_floor": at["MxD"] / at["floor"],
                "dense_over_step": at["MxD, dense einsum"] / at["MxD"],
                "dense_over_step_bf16": at["MxD, dense einsum"] / at["MxD, bfloat16"],
            }
        )
    )


if __name__ == "__main__":
    main()
