"""What every input-to-output layer is trained on: pairs, and the reference's loss on them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor


def split_pairs(
    pairs: Float[Tensor, "batch d_pair"], d_in: int, d_out: int
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
    """(mlp_in, mlp_out) of a training batch ``cat([mlp_in, mlp_out], -1)``.

    Raises:
        ValueError: the batch is not d_in + d_out wide.
    """
    if pairs.shape[-1] != d_in + d_out:
        raise ValueError(
            f"a training batch has width {pairs.shape[-1]}, need d_in + d_out = "
            f"{d_in + d_out}: cat([mlp_in, mlp_out], -1)"
        )
    x, y = pairs.split([d_in, d_out], dim=-1)
    return x, y


def pair_loss(
    y_hat: Float[Tensor, "batch d_out"], y: Float[Tensor, "batch d_out"]
) -> Float[Tensor, ""]:
    """Mean over tokens and outputs of ``(y_hat - y)^2 / ||y||_2`` (the reference's loss)."""
    norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return ((y_hat.to(y.dtype) - y).square() / norm).mean()


def step_output(
    y: Float[Tensor, "batch d_out"],
    y_hat: Float[Tensor, "batch d_out"],
    codes: tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]] | Float[Tensor, "batch d_sae"],
    d_sae: int,
    aux_losses: Mapping[str, Tensor],
) -> TrainStepOutput:
    """A training step's outcome, as SAETrainer reads it: `pair_loss`, and other losses added.

    ``sae_in`` is the target, from which SAETrainer logs explained variance; ``feature_acts`` is
    a detached tensor [batch, d_sae], sparse where the codes are, for it to count firings of.
    """
    mse_loss = pair_loss(y_hat, y)
    losses = {"mse_loss": mse_loss, **aux_losses}
    if isinstance(codes, Tensor):
        values, acts = codes, codes.detach()
    else:
        values, indices = codes
        acts = as_coo(values.detach(), indices, d_sae)
    return TrainStepOutput(
        sae_in=y,
        sae_out=y_hat.to(y.dtype),
        feature_acts=acts,
        hidden_pre=values,
        loss=torch.stack(list(losses.values())).sum(),
        losses={name: loss.detach() for name, loss in losses.items()},
    )


def as_coo(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], d_sae: int
) -> Float[Tensor, "batch d_sae"]:
    """The coefficients as a sparse tensor, which SAETrainer can count firings of."""
    batch, k = values.shape
    rows = torch.arange(batch, device=values.device).repeat_interleave(k)
    return torch.sparse_coo_tensor(
        torch.stack([rows, indices.flatten()]),
        values.flatten(),
        (batch, d_sae),
        check_invariants=False,
    )
