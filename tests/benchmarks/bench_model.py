"""What a language model with an MxD in place costs, against the original.

    make bench [DEVICE=cuda]

SmolLM2-135M with an MxD of the demo's size at layer 6; tokens per second of a forward pass over 128
tokens, and of cached generation of 32. The floor is the original plus the gate's product.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from mxd_lens import MxD, MxDConfig, load_model, splice

DEVICE = os.environ.get("DEVICE", "cpu")
LAYER, N_READ, N_WRITTEN = 6, 128, 32


def seconds(step: Callable[[], object], at_least: float = 1.0) -> float:
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=at_least).median


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = load_model("demo:smollm2", device=DEVICE)
    d = model.cfg.d_model
    mxd = MxD(MxDConfig(d_in=d, d_out=d, d_hidden=1536, d_sae=6906, k=32, device=DEVICE))
    acts_hook = f"blocks.{LAYER}.mlp.hook_sae_acts_post"
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads; tokens/s\n")
    print("| | original | MxD | floor | MxD, activations hooked | MxD, output hooked |")
    print("|---|---|---|---|---|---|")
    for batch in (1, 32):
        tokens = torch.randint(100, 40_000, (batch, N_READ), device=DEVICE)

        def forward(hook: str | None = None, tokens=tokens) -> object:
            hooks = [] if hook is None else [(hook, lambda acts, hook: None)]
            return model.run_with_hooks(tokens, fwd_hooks=hooks)

        def generate(hook: str | None = None, tokens=tokens) -> object:
            hooks = [] if hook is None else [(hook, lambda acts, hook: None)]
            with model.hooks(fwd_hooks=hooks):
                return model.generate(
                    tokens[:, :16], max_new_tokens=N_WRITTEN, stop_at_eos=False, verbose=False
                )

        for name, run, n_tokens, gate_rows, times in (
            ("forward", forward, batch * N_READ, batch * N_READ, 1),
            ("generate", generate, batch * N_WRITTEN, batch, N_WRITTEN),
        ):
            x = torch.randn(gate_rows, d, device=DEVICE)
            original = seconds(run)
            gate = times * seconds(lambda x=x: x @ mxd.W_enc)
            with splice(model, {LAYER: mxd}):
                swapped = seconds(run)
                looked_at = seconds(lambda run=run: run(acts_hook))
                output = seconds(lambda run=run: run(f"blocks.{LAYER}.mlp.hook_out"))
            shown = [n_tokens / t for t in (original, swapped, original + gate, looked_at, output)]
            cells = " | ".join(f"{rate:,.0f}" for rate in shown)
            print(f"| {name}, batch {batch} | {cells} |", flush=True)
    print()


if __name__ == "__main__":
    main()
