"""What scores steered samples."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mxd_lens.analysis.embedding import coherence, embed

Scores = dict[str, float]


class Judge:
    """Scores of the samples that steering one expert gave, by the model itself and by MiniLM.

    Calling it with texts that continue the prompt returns ``coherence``, the mean cosine of two
    samples' sentence embeddings, and ``perplexity`` to the model, nothing steered: exp of the mean
    nats per token after the prompt.
    """

    def __init__(self, model: Any, prompt: str):
        self.model = model
        self.prompt = prompt

    @torch.no_grad()
    def __call__(self, samples: list[str]) -> Scores:
        device = str(self.model.cfg.device)
        return {
            "coherence": coherence(embed(samples, device=device)).item(),
            "perplexity": self._nats(samples).mean().exp().item(),
        }

    def _nats(self, samples: list[str]) -> Float[Tensor, "tokens"]:
        model = self.model
        n_prompt = model.to_tokens(self.prompt).shape[1]
        tokens = [model.to_tokens(self.prompt + sample)[0] for sample in samples]
        lengths = torch.tensor([len(of_sample) for of_sample in tokens])
        # Padding goes to the right, where no causal model sees it.
        padded = pad_sequence(tokens, batch_first=True)
        nats = model(padded, return_type="loss", loss_per_token=True)  # [batch, pos - 1]
        predicted = torch.arange(1, padded.shape[1])  # which token each is the loss of
        counts = (predicted >= n_prompt) & (predicted < lengths[:, None])
        return nats[counts.to(nats.device)]
