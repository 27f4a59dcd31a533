"""How faithful a replacement layer is, and whether its experts matter to that.

Faithfulness: what the language model loses when the layer stands in for the MLP. Meaning: what it
loses when the layer keeps its dense part and its gate is ablated. Both are needed: a layer that
copies the MLP's weights is perfectly faithful, and its experts do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.alone import Alone
from mxd_lens.analysis.in_model import InModel
from mxd_lens.analysis.jacobian import jacobians
from mxd_lens.data.reading import Heldout, read_heldout
from mxd_lens.data.text import Text
from mxd_lens.layers import layer_of
from mxd_lens.models.site import Site
from mxd_lens.models.splice import get_mlp


@torch.no_grad()
def evaluate(
    model: Any,
    sae: SAE[Any],
    dataset: Text | Heldout,
    *,
    n_sequences: int = 64,
    n_tokens: int = 100_000,
    n_jacobian_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[dict[str, Any], Float[Tensor, "d_sae"] | None]:
    """Measure a layer of any architecture on held-out documents.

    Special tokens pass through the original MLP, count nowhere, and are not predicted. All is
    computed in float32, as far as the model's weights are: bfloat16 alone changes cross-entropies
    by 0.001 nats, which is the size of good layers' increases.

    Args:
        model: the language model, unspliced, that `sae.cfg.metadata` names the hooks of.
        dataset: documents in a column ``text``, or sequences in ``input_ids``, none of them trained
            on; or what `read_heldout` made of them, where several layers share it.
        n_sequences, n_tokens, batch_size: as in `read_heldout`.
        n_jacobian_tokens: tokens at which Jacobians are compared.

    Returns:
        The measurements, ready for JSON, and how often each unit fires per token. What a dense
        control lacks is None. Keys:

        - ``ce_original``, ``ce_replaced``, ``ce_zero_ablation``, ``ce_increase``;
          ``ce_recovered``: share of the loss by zero-ablation that the layer wins back;
          ``kl``: original to replaced model, nats per token; ``ce_replaced_all_positions``:
          the layer on special tokens too, as after ``model.blocks[L].mlp = sae``. ``..._interval``:
          95%, by the paired bootstrap over sequences, whose sums are in ``sequences``.
        - ``ce_floor``, ``kl_floor``: CE increase and KL of an exact copy of the MLP: what measuring
          itself costs.
        - ``fvu``: summed squared error over summed variance; ``nmse``, ``nmse_median``: squared
          error over squared norm, per token.
        - ``l0``; ``alive_fraction``: experts that fired in ``n_tokens``; ``always_on``: number
          of experts that fire on over half of the tokens.
        - ``ce_mean_gate``: the sparse term (an MxD's ``a W_dec``, otherwise the decoder's
          output) replaced by its mean; ``ce_shuffled_gate``: by another token's;
          ``ce_shuffled_gate_matched``: by another's, scaled to its own norm; ``share``: of the loss
          by zero-ablation, that by the gate at its mean beyond the layer's own;
          ``experts_cosine``: mean cosine of the sparse term to its mean direction.
        - ``jacobian_...``: see `jacobians`.
        - ``by_frequency``, ``by_position``: nmse, CE increase, what the gate at its mean adds and
          what removing the MLP costs, by how often the token occurs in a million, and by where.

    Raises:
        ValueError: the text is too short for a single batch, metadata is missing, or an unknown
            architecture.
    """
    metadata = sae.cfg.metadata
    layer = layer_of(sae)
    site = Site.of(model, sae)
    if not isinstance(dataset, Heldout):
        if not metadata.context_size:
            raise ValueError("sae.cfg.metadata must say context_size")
        dataset = read_heldout(
            site,
            dataset,
            context_size=int(metadata.context_size),
            device=str(sae.device),
            n_sequences=n_sequences,
            n_tokens=n_tokens,
            batch_size=batch_size,
        )
    alone = Alone(layer)
    for pair in tqdm(dataset.pairs, desc="Measuring the layer"):
        alone.add(*(pair[hook] for hook in site.hooks))
    x = torch.cat([pair[site.mlp_in] for pair in dataset.pairs])
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    mlp = get_mlp(site.model, site.layer)
    row = {
        "architecture": metadata.training_architecture or sae.cfg.architecture(),
        "model_name": metadata.model_name,
        "hook_layer": site.layer,
        "hook_name": site.hook_in,
        "hook_name_out": site.hook_out,
        "k": getattr(sae.cfg, "k", None),
        "d_sae": sae.cfg.d_sae,
        "d_hidden": getattr(sae.cfg, "d_hidden", None),
        "n_parameters": sum(p.numel() for p in sae.parameters()),
        "training_tokens": metadata.training_tokens,
        **InModel(layer, site, dataset, alone.mean_sparse, seed).row(),
        **alone.row(),
        **jacobians(layer, mlp, x[chosen[:n_jacobian_tokens].to(x.device)]),
    }
    return row, alone.density
