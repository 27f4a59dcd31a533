"""What decides a result besides its settings, in a few bytes: to find that it has changed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from datasets import Dataset

from mxd_lens.data.tokens import Text, is_tokenized, token_batches

_N_WEIGHTS = 1024  # of each parameter
_N_DOCUMENTS = 100_000
_N_STREAMED = 1000


def model_fingerprint(model: torch.nn.Module) -> str:
    """32 hexadecimal digits of all parameters' shapes, types and 1,024 evenly spaced numbers.

    Not of their names, which are another library's, and change.
    """
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}\n".encode())
        numbers = parameter.detach().reshape(-1)
        some = numbers[:: max(1, len(numbers) // _N_WEIGHTS)].contiguous()
        digest.update(some.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def text_fingerprint(rows: Text) -> str:
    """32 hexadecimal digits of the number of documents, or sequences of tokens, and up to 100,000
    evenly spaced ones.

    A streamed data set, whose end nobody knows, has that of its first 1,000.
    """
    digest = hashlib.sha256()
    if isinstance(rows, Dataset):
        digest.update(f"{len(rows)}\n".encode())
        if (step := len(rows) // _N_DOCUMENTS) > 1:
            rows = rows.select(range(0, len(rows), step))
    else:
        rows = rows.take(_N_STREAMED)
    if is_tokenized(rows):
        for ids in token_batches(rows):
            digest.update(ids.tobytes())
        return digest.hexdigest()[:32]
    row: Any
    for row in rows:
        digest.update(repr(sorted(row.items())).encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]
