"""Does a layer compute as the MLP does? Input-output Jacobians, token by token.

A transcoder may predict the MLP's output and still change otherwise than it when its input does.
The part of the Jacobian that flows through the activations tells what experts have in that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from mxd_lens.layers.layer import Layer

Function = Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d_out"]]


def jacobians(
    layer: Layer, mlp: nn.Module, x: Float[Tensor, "tokens d_in"]
) -> dict[str, float | None]:
    """How much the layer's Jacobian is the MLP's, at these inputs of the MLP.

    Takes d_out backward passes of each; nothing of size [tokens, d_out, d_in] is held.

    Args:
        mlp: the module itself, [batch, pos, d_in] to [batch, pos, d_out]. A layer that reads its
            output, an SAE, is taken together with it.

    Returns:
        - ``jacobian_cosine``, ``jacobian_cosine_median``: over tokens, of ``dy_hat/dx`` to
          ``dy/dx``, both as vectors;
        - ``jacobian_gate_share``: of the squared norm of ``dy_hat/dx``, summed over tokens, that of
          the part that goes away where activations are constants;
        - ``jacobian_gate_cosine``: mean cosine of that part to ``dy/dx``.

        The last two are None of a layer without experts.
    """
    x, weight = x.detach(), next(mlp.parameters())

    def of_mlp(x: Tensor) -> Tensor:
        return mlp(x[None].to(weight.device, weight.dtype))[0].to(x)

    def of_layer(x: Tensor) -> Tensor:
        return layer.sae(x if layer.reads_input else of_mlp(x))

    def constant_codes(x: Tensor) -> Tensor:
        held = [("hook_sae_acts_post", lambda acts, hook: acts.detach())]
        return layer.sae.run_with_hooks(x if layer.reads_input else of_mlp(x), fwd_hooks=held)

    functions = [of_mlp, of_layer, *([constant_codes] if layer.has_experts else [])]
    sums = _inner_products(functions, x)  # [functions, functions, tokens]
    cosine = _cosine(sums[0, 1], sums[1, 1], sums[0, 0])
    found: dict[str, float | None] = {
        "jacobian_cosine": cosine.mean().item(),
        "jacobian_cosine_median": cosine.median().item(),
        "jacobian_gate_share": None,
        "jacobian_gate_cosine": None,
    }
    if layer.has_experts:
        of_gate = sums[1, 1] - 2 * sums[1, 2] + sums[2, 2]
        with_mlp = sums[0, 1] - sums[0, 2]
        found["jacobian_gate_share"] = (of_gate.sum() / sums[1, 1].sum()).item()
        found["jacobian_gate_cosine"] = _cosine(with_mlp, of_gate, sums[0, 0]).mean().item()
    return found


@torch.enable_grad()
def _inner_products(
    functions: list[Function], x: Float[Tensor, "tokens d_in"]
) -> Float[Tensor, "functions functions tokens"]:
    """Of the Jacobians, as vectors, of each two of these functions of a token."""
    x = x.clone().requires_grad_()
    outputs = [function(x) for function in functions]
    sums = torch.zeros(len(outputs), len(outputs), len(x), dtype=torch.float64)
    for i in tqdm(range(outputs[0].shape[-1]), desc="Jacobians"):
        rows = []
        for y in outputs:
            row = None
            if y.requires_grad:
                (row,) = torch.autograd.grad(y[:, i].sum(), x, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(x) if row is None else row)
        of_row = torch.stack(rows).cpu().double()
        sums += torch.einsum("ftd,gtd->fgt", of_row, of_row)
    return sums


def _cosine(inner: Tensor, square: Tensor, other: Tensor) -> Float[Tensor, "tokens"]:
    norm = (square.clamp_min(0) * other).sqrt()
    return torch.where(norm > 0, inner / norm.clamp_min(1e-300), torch.zeros_like(inner))
