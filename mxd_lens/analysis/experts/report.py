"""What each expert of a layer fires on and what it does, as a report ready for JSON.

The same for every layer whose units are sparsely active::

    report = inspect_experts(model, sae, load_text("demo:wikipedia"))

The texts are read once, and what is kept of that are the firings, 16 bytes each: where an expert
fires for the strongest and for weaker times, words that tell those places from the rest of the
text, whether they are about the same thing, and which experts fire together are read off them.
From the weights come the rank of an expert's linear map and the experts that resemble it; from
the language model which tokens an expert makes likelier, and whether these are what it fires
on: an expert may tell a subject apart without writing about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAE
from torch import Tensor

from mxd_lens.analysis.embedding import embed
from mxd_lens.analysis.experts.contexts import (
    Embed,
    histograms_of,
    meaning,
    name_experts,
    pick_contexts,
)
from mxd_lens.analysis.experts.corpus import N_TOP, read_corpus, read_firings
from mxd_lens.analysis.experts.effects import logit_effects, short
from mxd_lens.analysis.experts.nearest import coactive, nearest_experts
from mxd_lens.data.text import Text
from mxd_lens.fields import Count, check
from mxd_lens.layers import layer_of
from mxd_lens.models.site import Site


def inspect_experts(
    model: Any,
    sae: SAE[Any],
    texts: Sequence[str] | Text,
    *,
    n_tokens: int = 100_000,
    context_size: int = 128,
    lm_batch_size: int = 32,
    directions: Float[Tensor, "d_sae d_out"] | None = None,
    autocast: bool = False,
    embed: Embed = embed,
    seed: int = 0,
) -> dict[str, Any]:
    """Describe every expert that fires on the texts.

    Args:
        model: the language model, unspliced, that `sae.cfg.metadata` names the hooks of.
        texts: documents, or a data set of them in a column ``text``, or of sequences of tokens in
            ``input_ids``. Each is read by itself, after a BOS token; special tokens and repeated
            documents are left out.
        n_tokens: read the first documents that have so many non-special tokens; all, if fewer.
        context_size: tokens of a document that are read, BOS included.
        lm_batch_size: documents per pass of the language model.
        directions: what is added to the layer's output for each expert when its effect on the
            next token is measured, see `logit_effects`, the slowest part. None: ``promoted``,
            ``suppressed`` and ``agreement`` stay null.
        autocast: read the documents in bfloat16 where that is safe. Effects never are.
        embed: sentence embeddings, by whose cosines top contexts are compared.
        seed: of the random sets of contexts that coherent ones are told from.

    Returns:
        Ready for JSON: ``model_name``, ``hook_name``, ``hook_name_out``, ``architecture``, ``k``,
        ``d_sae``, ``dataset`` (null, for the caller to fill in), ``n_tokens`` that were read,
        ``n_live``, the ``rule`` by which an expert counts as meaningful, ``texts`` (token strings
        of those that a context refers to) and ``experts``, those that fired, by id:

        - ``id``, ``name`` (see `name_experts`), ``density`` (share of the tokens it fires on);
        - of the activation where it fires: ``mean``, ``max`` and ``histogram`` (20 equal bins
          from 0 to max);
        - ``contexts``: ``text`` (an index of ``texts``), ``position`` of the firing token in it,
          ``value`` and ``quantile`` of the activation: 1 for the top ones, the strongest
          firing in each of up to 10 texts, then up to two at each of `QUANTILES`;
        - ``coherence`` (null with fewer than 10 top contexts), ``same_token``, ``meaningful``:
          see `meaning`;
        - ``promoted``, ``suppressed``: token strings and changes of their logit, strongest first,
          and ``agreement`` of these changes with its own contexts: see `logit_effects`;
        - ``nearest``, ``coactive``: ids and cosine or Jaccard index, see `nearest_experts` and
          `coactive`;
        - ``rank``, ``effective_rank``: see `Layer.ranks`; ``sample``: null, for a steered sample.

    Raises:
        ValueError: a size below 1, a hook that metadata or model lack, fewer than 10 different
            documents with a non-special token, no expert that fires, or a layer without any.
    """
    check(Count, n_tokens=n_tokens, context_size=context_size, lm_batch_size=lm_batch_size)
    layer = layer_of(sae)
    if not layer.has_experts:
        raise ValueError(f"a {layer.label} has no experts to inspect")
    site = Site.of(model, sae)
    corpus = read_corpus(site, texts, n_tokens, context_size)
    firings = read_firings(site, sae, corpus, lm_batch_size=lm_batch_size, autocast=autocast)
    contexts, quantiles = pick_contexts(firings, corpus)
    top = contexts[:, :N_TOP]
    names = name_experts(top, firings, corpus)
    coherences, same_token, meaningful, rule = meaning(top, firings, corpus, embed, seed)
    promoted = suppressed = agreement = [None] * len(firings.live)
    if directions is not None:
        promoted, suppressed, agreement = logit_effects(
            model,
            site.hook_out,
            directions[torch.from_numpy(firings.live).to(directions.device)],
            top,
            firings,
            corpus,
            seed=seed,
        )
    near, together = nearest_experts(layer, firings.live), coactive(firings, len(corpus.ids))
    rank, effective_rank = layer.ranks()
    counts = firings.counts
    mean = np.add.reduceat(firings.value, firings.starts[:-1], dtype=np.float64) / counts
    largest = firings.value[firings.starts[:-1]]
    histograms = histograms_of(firings)
    shown = np.unique(corpus.text[firings.token[contexts[contexts >= 0]]])

    def context(firing: int, quantile: float) -> dict[str, Any]:
        token = firings.token[firing]
        text = corpus.text[token]
        return {
            "text": int(np.searchsorted(shown, text)),
            "position": int(token - corpus.starts[text]),
            "value": short(firings.value[firing]),
            "quantile": quantile,
        }

    experts = [
        {
            "id": int(expert),
            "name": names[row],
            "density": short(counts[row] / len(corpus.ids)),
            "mean": short(mean[row]),
            "max": short(largest[row]),
            "histogram": histograms[row].tolist(),
            "contexts": [
                context(firing, quantile)
                for firing, quantile in zip(contexts[row], quantiles, strict=True)
                if firing >= 0
            ],
            "coherence": None if np.isnan(coherences[row]) else short(coherences[row]),
            "same_token": short(same_token[row]),
            "meaningful": bool(meaningful[row]),
            "promoted": promoted[row],
            "suppressed": suppressed[row],
            "agreement": agreement[row],
            "nearest": [[i, short(score)] for i, score in near[row]],
            "coactive": [[i, short(score)] for i, score in together[row]],
            "rank": int(rank[expert]),
            "effective_rank": short(effective_rank[expert]),
            "sample": None,
        }
        for row, expert in enumerate(firings.live)
    ]
    return {
        "model_name": sae.cfg.metadata.model_name,
        "hook_name": site.hook_in,
        "hook_name_out": site.hook_out,
        "architecture": sae.cfg.metadata.training_architecture or sae.cfg.architecture(),
        "k": getattr(sae.cfg, "k", None),
        "d_sae": sae.cfg.d_sae,
        "dataset": None,
        "n_tokens": len(corpus.ids),
        "n_live": len(experts),
        "rule": rule,
        "texts": [corpus.strings[slice(*corpus.starts[i : i + 2])] for i in shown],
        "experts": experts,
    }
