"""One training step of the MxD against the dense einsum form of the same layer, in one run.

    make bench [DEVICE=cuda]

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import platform

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import TrainStepInput
from torch.utils.benchmark import Timer

from mxd_lens import TrainingMxD, TrainingMxDConfig

BATCH, D_MODEL, D_SAE, K, D_HIDDEN = 2048, 576, 16_118, 32, 1536
DEVICE = os.environ.get("DEVICE", "cpu")


def dense_loss(sae: TrainingMxD, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The layer as the paper writes it, every coefficient in memory."""
    pre = torch.einsum("bi,in->bn", x, sae.W_enc) + sae.b_enc
    values, indices = pre.topk(K, dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    gate = F.silu(torch.einsum("bi,ih->bh", x, sae.W_gate) + sae.b_gate)
    hidden = gate * (torch.einsum("bi,ih->bh", x, sae.W_in) + sae.b_in)
    shared = torch.einsum("bh,ho->bo", hidden, sae.W_out)
    y_hat = torch.einsum("bn,no->bo", acts, sae.W_dec) * shared + sae.b_dec
    return ((y_hat - y).square() / y.norm(dim=-1, keepdim=True)).mean()


def main() -> None:
    torch.manual_seed(0)
    shape = {"d_in": D_MODEL, "d_out": D_MODEL, "d_hidden": D_HIDDEN, "d_sae": D_SAE, "k": K}
    sae = TrainingMxD(TrainingMxDConfig(**shape, recipe="paper", device=DEVICE))
    torch.nn.init.normal_(sae.W_out, std=0.02)
    batch = torch.randn(BATCH, 2 * D_MODEL, device=DEVICE)
    x, y = batch.split(D_MODEL, dim=-1)
    step_input = TrainStepInput(batch, {}, None, 0, False)

    def sparse() -> None:
        sae.training_forward_pass(step_input).loss.backward()
        sae.zero_grad()

    def dense() -> None:
        dense_loss(sae, x, y).backward()
        sae.zero_grad()

    def floor() -> None:
        """The gate's forward; the dense part's forward and backward."""
        with torch.no_grad():
            x @ sae.W_enc
        hidden = F.silu(x @ sae.W_gate) * (x @ sae.W_in)
        (hidden @ sae.W_out).sum().backward()
        sae.zero_grad()

    torch.testing.assert_close(
        sae.training_forward_pass(step_input).loss, dense_loss(sae, x, y), rtol=1e-4, atol=1e-6
    )
    milliseconds = {
        run.__name__: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=8)
        .median
        * 1e3
        for run in (floor, sparse, dense)
    }
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads,", end=" ")
    print(f"{platform.machine()}; B {BATCH}, d {D_MODEL}, N {D_SAE}, k {K}, GLU H {D_HIDDEN}\n")
    print("| forward + backward | ms | over the floor |\n|---|---|---|")
    for name, ms in milliseconds.items():
        print(f"| {name} | {ms:.0f} | {ms / milliseconds['floor']:.2f} |")
    print()
    print(
        json.dumps(
            {
                "step_over_floor": milliseconds["sparse"] / milliseconds["floor"],
                "dense_over_step": milliseconds["dense"] / milliseconds["sparse"],
            }
        )
    )


if __name__ == "__main__":
    main()
