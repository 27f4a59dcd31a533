"""MLP inputs and outputs on disk: one pass of the language model serves many training runs."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.data.activations import Reader
from mxd_lens.data.stream import N_SAMPLE, Part
from mxd_lens.files import check_same, claim, locked, read_json, remove_unfinished, write_json
from mxd_lens.ranks import Ranks


def fill(
    folders: Mapping[int, Path],
    open_reader: Callable[[Sequence[Sequence[int]]], Reader],
    n_tokens: int,
    source: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Have pairs of n_tokens non-special tokens in each folder, reading what is missing.

    ``pairs.bin`` holds rows of d_in + d_out numbers of the dtype that ``cfg.json`` names. An
    interrupted call goes on where it stopped, without the model's reading anything twice. Of
    several processes one fills a folder, and the others wait for it.

    Args:
        folders: by layer, those that this rank fills.
        open_reader: reads for each rank the pairs of these layers.
        source: all else that decides what the pairs are; recorded, and compared.

    Raises:
        ValueError: too little text, or a folder with pairs of another source or damaged ones.
        OSError: the disk is full; what has been written counts.
        NonFiniteActivations: the model produced inf or nan.
    """
    with ExitStack() as stack:
        of_layers = {
            layer: stack.enter_context(_opened(folder, source | {"layer": layer}))
            for layer, folder in folders.items()
        }
        short = {n: cfg for n, cfg in of_layers.items() if cfg["n_tokens"] < n_tokens}
        progress = {n: (cfg["n_lm_batches"], cfg["n_tokens"]) for n, cfg in short.items()}
        of_ranks = ranks.gather(progress)
        begun = [one for of_rank in of_ranks for one in of_rank.values()]
        if not begun:
            return
        first, read = min(begun)
        files = {n: stack.enter_context(_appending(folders[n], cfg)) for n, cfg in short.items()}
        reader = open_reader([list(of_rank) for of_rank in of_ranks])
        bar = tqdm(desc="Language model", total=n_tokens, initial=read, unit="tok")
        stack.callback(bar.close)
        for one in reader.read(islice(reader.passes(), first, None)):
            assert one.pairs is not None
            for layer, cfg in short.items():
                if one.number >= cfg["n_lm_batches"]:
                    _append(folders[layer], files[layer], cfg, one.pairs[layer][one.kept])
            n_rows = int(one.kept.sum())
            bar.update(n_rows)
            read += n_rows
            if read >= n_tokens:
                return


@contextmanager
def _opened(folder: Path, source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a folder says of its pairs, while no other process fills it."""
    waiting = f"waiting for another process that is filling {folder} with activations"
    with locked(folder, waiting):
        if not (folder / _CACHE_CFG).exists():
            claim(folder, _CACHE_CFG, {"source": source} | _EMPTY, [_PAIRS])
        cfg = _read_cache_cfg(folder)
        remove_unfinished(folder)
        check_same(f"the cache of activations in {folder}", cfg["source"], source)
        _check_sum(folder, cfg)
        yield cfg


@contextmanager
def _appending(folder: Path, cfg: dict[str, Any]) -> Iterator[BinaryIO]:
    with _named(folder / _PAIRS), (folder / _PAIRS).open("ab") as file:
        file.truncate(_n_bytes(cfg))  # what a kill has left is not counted
        yield file


def _append(
    folder: Path, file: BinaryIO, cfg: dict[str, Any], pairs: Float[Tensor, "rows d_pair"]
) -> None:
    """Add a pass's rows, and count them."""
    rows = pairs.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    with _named(folder / _PAIRS):
        file.write(rows)
        file.flush()
    cfg |= {
        "n_tokens": cfg["n_tokens"] + len(pairs),
        "n_lm_batches": cfg["n_lm_batches"] + 1,
        "width": pairs.shape[-1],
        "dtype": str(pairs.dtype).removeprefix("torch."),
        "crc32": zlib.crc32(rows, cfg["crc32"]),
    }
    write_json(folder / _CACHE_CFG, cfg)


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


class Cached(Iterator[dict[Part, Float[Tensor, "batch d_pair"]]]):
    """Batches like a `Stream`'s, out of the first n_tokens of what is in the layers' folders.

    Each seed shuffles them as a whole, so that every layer trained with it sees the same tokens.
    """

    def __init__(
        self,
        folders: Mapping[int, Path],
        parts: Sequence[Part],
        *,
        n_tokens: int,
        batch_size: int,
        first: int = 0,
    ):
        self.rows: dict[int, Float[Tensor, "n_tokens d_pair"]] = {
            part.layer: stored_pairs(folders[part.layer], n_tokens) for part in parts
        }
        self.orders: dict[int, Int[Tensor, "n_tokens"]] = {
            seed: torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed))
            for seed in {part.seed for part in parts}
        }
        self.parts: Sequence[Part] = parts
        self.batch_size: int = batch_size
        self.next: int = first

    def __next__(self) -> dict[Part, Float[Tensor, "batch d_pair"]]:
        batch = slice(self.next * self.batch_size, (self.next + 1) * self.batch_size)
        self.next += 1
        return {
            part: self.rows[part.layer][part.of(self.orders[part.seed][batch])].float()
            for part in self.parts
        }

    def sample(self, part: Part) -> Float[Tensor, "tokens d_pair"]:
        """As `Stream.sample`."""
        first = self.next * self.batch_size
        tokens = slice(first, first + N_SAMPLE * self.batch_size)
        return self.rows[part.layer][self.orders[part.seed][tokens]].float()


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
