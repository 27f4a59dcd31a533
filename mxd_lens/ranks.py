"""The processes that share a run: one alone, or those that ``torchrun`` has started."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    """Which one it is, counted from 0."""
    world: int = 1
    """How many there are."""

    @classmethod
    def here(cls) -> Ranks:
        """Those that ``torchrun`` started this process with, connected to each other."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls()
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # One may wait for hours for what the first, or another process, is at work on.
            dist.init_process_group(backend, timeout=timedelta(days=7))
        return cls(dist.get_rank(), world)

    @property
    def first(self) -> bool:
        """True in the one process that speaks, and writes what is everybody's."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The first rank's value, in all of them; it can be pickled."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in all of them; they can be pickled."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.world == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier()

    def group(self, members: Sequence[int]) -> Any:
        """Some of the ranks, for torch.distributed; all of them have to ask, in the same order."""
        return dist.new_group(list(members)) if self.world > 1 else None

    def exchange(
        self, parts: Sequence[Shaped[Tensor, "of_receiver"]], n_from_each: int
    ) -> list[Shaped[Tensor, "n_from_each"]]:
        """Send the i-th part to rank i.

        Args:
            parts: of one type; may be of different lengths.
            n_from_each: how many numbers each rank sends to this one.

        Returns:
            What each rank has sent to this one, by sender.
        """
        sent = torch.cat(list(parts))
        size = sent.element_size()
        received = sent.new_empty(n_from_each * self.world)
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [n_from_each * size] * self.world,
            [len(part) * size for part in parts],
        )
        return [received[i * n_from_each : (i + 1) * n_from_each] for i in range(self.world)]


def lost_rank(error: RuntimeError) -> str | None:
    """What to say if this is how a rank learns that another one has died."""
    lost = "[Cc]onnection (closed|reset)|remote process exited|communicator was aborted"
    if not dist.is_initialized() or not re.search(lost, str(error)):
        return None
    return (
        "another rank has ended, and so this one does; the same command goes on with what is not "
        f"finished, with any number of ranks ({error})"
    )


def take_device() -> None:
    """Under ``torchrun``, have ``cuda`` mean this rank's own GPU."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
