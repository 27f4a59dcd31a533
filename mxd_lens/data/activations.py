"""(mlp_in, mlp_out) pairs, for training.

They come from the language model as training goes (`pairs`), or from a folder that one pass of
the model has filled for many training runs (`cache_pairs`, `cached_pairs`).
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm.auto import tqdm

from mxd_lens.data.text import Text
from mxd_lens.fields import ContextSize, Count, check
from mxd_lens.files import check_same, claim, locked, read_json, remove_unfinished, write_json
from mxd_lens.models.site import Hooks, Site


def activations_store(
    site: Site,
    dataset: Text,
    *,
    context_size: int,
    batch_size: int,
    lm_batch_size: int,
    device: str,
    autocast_lm: bool,
) -> ActivationsStore:
    """SAELens' store over both hooks of an MLP: one LM pass that stops at the layer; ValueError for
    a size out of range, or a text of no documents or of special tokens only."""
    check(ContextSize, context_size=context_size)
    check(Count, batch_size=batch_size, lm_batch_size=lm_batch_size)
    if next(iter(dataset), None) is None:
        raise ValueError("there is no document: give more text or hold out fewer")
    # Half of the buffer is served between two shuffles: at least eight batches or LM passes.
    buffer = max(16 * batch_size, 16 * lm_batch_size * context_size // 2)
    store = ActivationsStore.from_config_multi_hook(
        site.model,
        dataset=dataset,
        hook_names=list(site.hooks),
        hook_d_ins={hook: int(site.model.cfg.d_model) for hook in site.hooks},
        context_size=context_size,
        n_batches_in_buffer=buffer // context_size,
        total_training_tokens=0,
        store_batch_size_prompts=lm_batch_size,
        train_batch_size_tokens=batch_size,
        exclude_special_tokens=site.special.to(device),
        device=device,
        autocast_lm=autocast_lm,
    )
    sequences = store._iterate_tokenized_sequences()  # beside those that the store hands out
    first = next(sequences, None)
    if first is not None and not any(
        site.non_special(tokens).any() for tokens in chain([first], sequences)
    ):
        raise ValueError("the text holds special tokens only: nothing to train or measure on")
    return store


class NonFiniteActivations(ValueError):
    """The language model produced inf or nan."""


def pairs(store: ActivationsStore, site: Site) -> Iterator[Float[Tensor, "batch d"]]:
    """``cat([mlp_in, mlp_out], -1)`` batches without end, for a `SAETrainer`.

    Raises:
        ValueError: the text has too few tokens for a single batch.
        NonFiniteActivations: a batch holds inf or nan; it is not handed out.
    """
    loader = store.get_multi_hook_data_loader()
    while True:
        try:
            batch = next(loader)
        except (StopIteration, RuntimeError, ValueError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error.__cause__, StopIteration):
                raise
            raise too_short(store) from error
        yield _pair(batch, site.hooks)


def _pair(acts: dict[str, Tensor], hooks: Hooks) -> Float[Tensor, "tokens d"]:
    pair = torch.cat([acts[hook].float() for hook in hooks], dim=-1)
    # Smallest and largest are both nan if one number is.
    if len(pair) and not torch.stack(pair.aminmax()).isfinite().all():
        wrong = [hook for hook in hooks if not acts[hook].isfinite().all()]
        raise NonFiniteActivations(
            f"inf or nan in the activations at {' and '.join(wrong)}: the language model "
            "overflows on this text; load it in float32, without autocast"
        )
    return pair


def too_short(store: ActivationsStore, text: str = "text") -> ValueError:
    return ValueError(
        f"the {text} is too short: it has fewer than {store.store_batch_size_prompts} "
        f"sequences of {store.context_size} tokens"
    )


def cache_pairs(
    folder: Path, store: ActivationsStore, site: Site, n_tokens: int, source: dict[str, Any]
) -> None:
    """Cache MLP input and output for n_tokens non-special tokens, resuming if partial.

    ``pairs.bin`` holds rows of d_in + d_out numbers of the dtype that ``cfg.json`` names:
    bfloat16 where the language model runs under autocast, which reads no more of them than that.
    An interrupted call goes on where it stopped, without the model's reading anything twice. Of
    several processes one fills the folder, and the others wait for it.

    Args:
        source: all that decides what the pairs are; recorded, and compared.

    Raises:
        ValueError: too little text, or a folder with pairs of another source or damaged ones.
        OSError: the disk is full; what has been written counts.
        NonFiniteActivations: the model produced inf or nan.
    """
    waiting = f"waiting for another process that is filling {folder} with activations"
    with locked(folder, waiting):
        if not (folder / _CACHE_CFG).exists():
            claim(folder, _CACHE_CFG, {"source": source} | _EMPTY, [_PAIRS])
        cfg = _read_cache_cfg(folder)
        remove_unfinished(folder)
        check_same(f"the cache of activations in {folder}", cfg["source"], source)
        _check_sum(folder, cfg)
        if cfg["n_tokens"] < n_tokens:
            _fill(folder, cfg, store, site, n_tokens)


def _fill(folder: Path, cfg: dict[str, Any], store: ActivationsStore, site: Site, n: int) -> None:
    dtype = torch.bfloat16 if store.autocast_lm else torch.float32
    with (
        _named(folder / _PAIRS),
        (folder / _PAIRS).open("ab") as file,
        tqdm(desc="Language model", total=n, initial=cfg["n_tokens"], unit="tok") as bar,
    ):
        file.truncate(_n_bytes(cfg))  # what a kill has left is not counted
        for i in count():
            try:
                tokens = store.get_batch_tokens()
            except StopIteration as error:
                raise too_short(store) from error
            if i < cfg["n_lm_batches"]:
                continue
            acts = store.get_multi_hook_activations(tokens)
            pair = _pair(site.kept(acts, tokens), site.hooks)
            rows = pair.to(dtype).cpu().view(torch.uint8).numpy().tobytes()
            file.write(rows)
            file.flush()
            cfg |= {
                "n_tokens": cfg["n_tokens"] + len(pair),
                "n_lm_batches": i + 1,
                "width": pair.shape[-1],
                "dtype": str(dtype).removeprefix("torch."),
                "crc32": zlib.crc32(rows, cfg["crc32"]),
            }
            write_json(folder / _CACHE_CFG, cfg)
            bar.update(len(pair))
            if cfg["n_tokens"] >= n:
                return


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk says for which file."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def _n_bytes(cfg: dict[str, Any]) -> int:
    return cfg["n_tokens"] * cfg["width"] * getattr(torch, cfg["dtype"]).itemsize


def _check_sum(folder: Path, cfg: dict[str, Any]) -> None:
    """Raise ValueError if the rows that ``cfg.json`` counts are not those that were written."""
    checksum, left = 0, _n_bytes(cfg)
    if left and (folder / _PAIRS).exists():
        with (folder / _PAIRS).open("rb") as file:
            while left and (block := file.read(min(left, 1 << 24))):
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
    if left or checksum != cfg["crc32"]:
        raise ValueError(
            f"the activations in {folder} are damaged, they are not those that were written: "
            "delete that folder to compute them again"
        )


def cached_pairs(
    folder: Path, n_tokens: int, batch_size: int, seed: int
) -> Iterator[Float[Tensor, "batch d"]]:
    """Batches like those of `pairs`, out of the first n_tokens that `cache_pairs` has put there.

    Shuffled as a whole by the seed, so that every layer trained with it sees the same batches.
    """
    rows = stored_pairs(folder, n_tokens)
    order = RandomSampler(range(n_tokens), generator=torch.Generator().manual_seed(seed))
    sampler = BatchSampler(order, batch_size, drop_last=True)
    loader = DataLoader(TensorDataset(rows), sampler=sampler, batch_size=None)
    while True:
        for (batch,) in loader:
            yield batch.float()


def stored_pairs(folder: Path, n_tokens: int) -> Float[Tensor, "n_tokens d"]:
    """The first n_tokens pairs in a folder of `cache_pairs`, in the text's order, left on disk;
    ValueError if it holds fewer."""
    cfg = _read_cache_cfg(folder)
    if cfg["n_tokens"] < n_tokens:
        raise ValueError(f"{folder} does not hold the activations of {n_tokens:,} tokens")
    size, dtype = n_tokens * cfg["width"], getattr(torch, cfg["dtype"])
    return torch.from_file(str(folder / _PAIRS), size=size, dtype=dtype).view(n_tokens, -1)


def _read_cache_cfg(folder: Path) -> dict[str, Any]:
    """What ``cfg.json`` says of the pairs; that there are none where there is no such file."""
    cfg = read_json(folder / _CACHE_CFG, dict[str, Any])
    if cfg is not None and cfg.keys() != {"source", *_EMPTY}:
        raise ValueError(f"{folder} holds something else than cached activations: name another")
    return cfg or _EMPTY


_PAIRS, _CACHE_CFG = "pairs.bin", "cfg.json"
_EMPTY = {"n_tokens": 0, "n_lm_batches": 0, "width": 0, "dtype": "float32", "crc32": 0}
