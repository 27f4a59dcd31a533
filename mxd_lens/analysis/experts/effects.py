"""Which tokens an expert makes likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.preprocessing import normalize
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from mxd_lens.analysis.experts.corpus import Corpus, Firings, token_strings

PIECE_SIZE = 8  # tokens of a piece of text in which effects are measured, without BOS
N_AVERAGED = 256  # experts whose effects are averaged


@torch.no_grad()
def logit_effects(
    model: Any,
    hook_name_out: str,
    directions: Float[Tensor, "live d_out"],
    top: Int[np.ndarray, "live n"],
    firings: Firings,
    corpus: Corpus,
    *,
    n: int = 8,
    n_pieces: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[list[list[list[Any]]], list[list[list[Any]]], list[float]]:
    """Logit effect of each direction, and its agreement with the expert's top contexts.

    Measured: what an expert writes is added to the layer's output at every token of some pieces
    of the corpus, the same for all experts, but for BOS. The change of the next token's logits,
    less its mean over the vocabulary and less what experts change on average, is averaged over
    the pieces. (Raising activations in the experts' own contexts instead says little: there, the
    next token completes a word or follows from what has been said.)

    Args:
        directions: what is added at hook_name_out for each expert that fires, see
            `mxd_lens.analysis.steering.steering_directions`.
        top: firings that are the experts' top contexts; -1: none.
        n: tokens wanted.
        n_pieces: pieces of text, of BOS and `PIECE_SIZE` tokens (fewer, if no text is as long).
        batch_size: rows per pass of the language model.
        seed: of the choice of pieces, and of experts for the average.

    Returns:
        For each expert ``[token string, change]`` of the n largest changes, and the n smallest.
        And the agreement, between 0 and 1: for which share of the other experts' contexts the
        correlation of the change with how typical a token is of them, see `_typical_tokens`, is
        lower than for its own. One half is chance.
    """
    rng = np.random.default_rng(seed)
    bos = int(corpus.tokens[0][0])
    place = np.arange(len(corpus.ids)) - corpus.starts[corpus.text]
    size = min(PIECE_SIZE, place.max() + 1)
    last = np.flatnonzero(place >= size - 1)
    last = rng.choice(last, min(n_pieces, len(last)), replace=False)
    pieces = [[bos, *corpus.ids[i + 1 - size : i + 1].tolist()] for i in last]
    tokens = torch.tensor(pieces, device=model.cfg.device)
    unedited = _last_logits(model, tokens).mean(0)

    def change(vectors: Float[Tensor, "part d_out"]) -> Float[Tensor, "part d_vocab"]:
        rows = vectors.to(tokens.device).repeat_interleave(len(tokens), 0)

        def add(acts: Float[Tensor, "batch pos d_out"], hook: HookPoint) -> Tensor:
            return torch.cat([acts[:, :1], acts[:, 1:] + rows[:, None].to(acts)], dim=1)

        logits = _last_logits(model, tokens.repeat(len(vectors), 1), [(hook_name_out, add)])
        of_part = logits.unflatten(0, (len(vectors), -1)).mean(1) - unedited
        return of_part - of_part.mean(-1, keepdim=True)

    n_rows = max(1, batch_size // len(tokens))
    some = torch.from_numpy(rng.permutation(len(directions))[:N_AVERAGED]).to(directions.device)
    of_some = torch.cat([change(part) for part in directions[some].split(n_rows)])
    usual, spread = of_some.mean(0), of_some.std(0, correction=0)
    spread = spread.clamp(min=spread.mean())  # no token counts for hardly ever changing

    def scores(of_part: Float[Tensor, "part d_vocab"]) -> Float[np.ndarray, "part live"]:
        typical_of = typical @ F.normalize((of_part - usual) / spread, dim=-1).cpu().numpy().T
        return np.asarray(typical_of.T)

    typical = _typical_tokens(top, firings, corpus, len(usual))
    usual_scores = scores(of_some).mean(0)
    promoted: list[Any] = []
    suppressed: list[Any] = []
    agreement: list[float] = []
    with tqdm(desc="Effects on logits", total=len(directions), unit="expert") as progress:
        for part in directions.split(n_rows):
            of_part = change(part)
            for found, largest in ((promoted, True), (suppressed, False)):
                best, ids = (of_part - usual).topk(n, dim=-1, largest=largest)
                strings = token_strings(model.tokenizer, ids.flatten().tolist())
                pairs = [[*pair] for pair in zip(strings, map(short, best.flatten()), strict=True)]
                found += [pairs[i : i + n] for i in range(0, len(pairs), n)]
            score = scores(of_part) - usual_scores
            own = score[range(len(part)), range(len(agreement), len(agreement) + len(part))]
            lower = (score < own[:, None]).sum(1) / max(1, len(directions) - 1)
            agreement += map(short, lower)
            progress.update(len(part))
    return promoted, suppressed, agreement


def _typical_tokens(
    top: Int[np.ndarray, "live n"], firings: Firings, corpus: Corpus, d_vocab: int
) -> Any:
    """How typical tokens are of experts' top contexts: a sparse array [live, d_vocab].

    A token that is in c of an expert's contexts (12 tokens on both sides of the firing one) where
    E are expected, by its frequency in the corpus, scores ``c log(c / E)``, where that is positive
    and c at least two. Rows have unit norm, or are zero.
    """
    row, token = [], []
    for expert, place in zip(*np.nonzero(top >= 0), strict=True):
        start, end = corpus.around(int(firings.token[top[expert, place]]), 12)
        found = np.unique(corpus.ids[start:end])
        row.append(np.full(len(found), expert))
        token.append(found)
    size = sum(map(len, token)) / max(1, len(token))
    ones = np.ones(sum(map(len, token)), np.float32)
    shape = (len(top), d_vocab)
    count = sparse.coo_array((ones, (np.concatenate(row), np.concatenate(token))), shape=shape)
    count.sum_duplicates()
    frequency = np.bincount(corpus.ids, minlength=d_vocab) / len(corpus.ids)
    expected = (top >= 0).sum(1)[count.row] * (1 - np.exp(-size * frequency[count.col]))
    score = np.where(count.data > 1, count.data * np.log(count.data / expected), 0)
    typical = sparse.csr_array((score.clip(min=0), (count.row, count.col)), shape=shape)
    unit: Any = normalize(typical)
    return unit.astype(np.float32)


def _last_logits(
    model: Any, tokens: Int[Tensor, "rows pos"], hooks: Sequence[Any] = ()
) -> Float[Tensor, "rows d_vocab"]:
    """The last token's logits; the others are not computed."""

    def last(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][:, -1:], *args[1:]

    handle = model.unembed.register_forward_pre_hook(last)
    try:
        return model.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, -1].float()
    finally:
        handle.remove()


def short(number: Any) -> float:
    """Four digits: all a report needs."""
    return float(f"{float(number):.4g}")
