"""What training many layers together takes, before any work: memory, passes, who does what."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from mxd_lens.data.activations import buffer_size
from mxd_lens.data.stream import N_SAMPLE
from mxd_lens.layers.base import gate_chunk
from mxd_lens.runs.config import RunConfig

SPARE = 0.9
"""Of the free memory, what is planned with."""

Member = tuple[int, ...]
"""The ranks that train a run."""


@dataclass(frozen=True)
class Job:
    """A run, as far as planning goes."""

    layer: int
    seed: int
    n_parameters: int
    largest: int
    """Parameters of the largest of its weights."""
    d_sae: int
    can_share: bool
    """Whether ranks may share its batches, see `Layer.splits_batches`."""
    dense_width: int = 0
    """As `Layer.dense_width`."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank, beside the language model."""

    layers: int
    """Weights, their gradients and Adam's two moments, and counts of firings."""
    buffers: int
    """Pairs that wait for their batch, and the sample that layers start from."""
    step: int
    """What the largest layer's step makes on the way."""
    reading: int
    """Activations of one pass of the language model, pairs of two, and what is exchanged."""

    @property
    def total(self) -> int:
        return self.layers + self.buffers + self.step + self.reading

    def __str__(self) -> str:
        parts = {"layers": self.layers, "buffers": self.buffers}
        parts |= {"a step": self.step, "a pass of the language model": self.reading}
        return ", ".join(f"{name} {gib(n)}" for name, n in parts.items())


@dataclass(frozen=True)
class Plan:
    """Which runs are trained together, and by which ranks."""

    passes: list[dict[int, Member]]
    """For each pass over the text: ranks by the number of the run."""
    memory: Memory
    """Of the rank that needs most."""
    free: int
    n_runs: int

    def __str__(self) -> str:
        passes = f"{len(self.passes)} passes" if len(self.passes) > 1 else "one pass"
        return (
            f"{self.n_runs} layers in {passes} over the text; {gib(self.memory.total)} of "
            f"{gib(self.free)} free: {self.memory}"
        )


def memory(
    jobs: Sequence[Job],
    cfg: RunConfig,
    *,
    d_pair: int,
    n_layers: int,
    itemsize: int,
    cached: bool,
    n_seeds: int = 1,
    world: int = 1,
) -> Memory:
    """What the jobs of one rank take.

    Args:
        d_pair: width of an MLP's input and output.
        n_layers: how many MLPs the language model is read at.
        itemsize: bytes of a number in the buffer.
        cached: pairs are read from a folder.
        n_seeds: orders of batches, each of which takes passes when its own batch is due.
        world: ranks.
    """
    row = d_pair * itemsize
    a_pass = cfg.lm_batch_size * cfg.context_size
    waiting = buffer_size(cfg.batch_size, cfg.lm_batch_size, cfg.context_size) + a_pass
    sample = N_SAMPLE * cfg.batch_size * d_pair * 4 * 2
    streams = 0 if cached else len({(job.layer, job.seed) for job in jobs})
    copies = 2 if world == 1 else 5  # of a pass's pairs
    held = (n_seeds > 1) * waiting * row * n_layers
    largest = max((job.largest for job in jobs), default=0)
    widest = max((job.d_sae for job in jobs), default=1)
    dense = cfg.batch_size * max((job.dense_width for job in jobs), default=0)
    chunk = widest * min(cfg.batch_size, gate_chunk(widest, cfg.device))
    return Memory(
        layers=sum(16 * job.n_parameters + 12 * job.d_sae for job in jobs),
        buffers=sample + streams * waiting * row,
        step=4 * (chunk + 4 * dense + 2 * largest + 8 * cfg.batch_size * d_pair),
        reading=0 if cached else held + a_pass * n_layers * (4 * d_pair + copies * row),
    )


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def make_plan(
    jobs: Sequence[Job], memory_of: Callable[[Sequence[Job]], Memory], free: int, world: int = 1
) -> Plan:
    """As few passes as fit into memory, each with the next runs in their order.

    Args:
        memory_of: what the jobs of one rank take.
        free: bytes on each rank's device.

    Raises:
        ValueError: there is a run that does not fit alone.
    """
    passes: list[dict[int, Member]] = []
    needs: list[Memory] = []
    together: list[int] = []
    for i, job in enumerate(jobs):
        tried = [*together, i]
        members, need = _dealt(jobs, tried, memory_of, world)
        if need.total > free * SPARE and together:
            tried = [i]
            members, need = _dealt(jobs, tried, memory_of, world)
        elif together:
            del passes[-1], needs[-1]
        if need.total > free * SPARE:
            raise ValueError(
                f"training the layer in place of MLP {job.layer} takes {gib(need.total)} beside "
                f"the language model, and {gib(free * SPARE)} of {gib(free)} free can be used "
                f"({need}): make it narrower (expansion, d_sae), or batches smaller"
            )
        together = tried
        passes.append(members)
        needs.append(need)
    return Plan(passes, max(needs, key=lambda need: need.total), free, len(jobs))


def _dealt(
    jobs: Sequence[Job],
    together: Sequence[int],
    memory_of: Callable[[Sequence[Job]], Memory],
    world: int,
) -> tuple[dict[int, Member], Memory]:
    members = dict(zip(together, deal([jobs[i] for i in together], world), strict=True))
    of_ranks = [
        memory_of([jobs[i] for i in together if rank in members[i]]) for rank in range(world)
    ]
    return members, max(of_ranks, key=lambda need: need.total)


def deal(jobs: Sequence[Job], world: int) -> list[Member]:
    """Ranks for each job: about as many parameters for every rank.

    The largest first, each to the rank with the fewest; where there are more ranks than jobs, the
    others share the batches of those that can be shared.
    """
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i].n_parameters)
    members: list[list[int]] = [[] for _ in jobs]
    loads = [0] * world
    for i in order:
        rank = loads.index(min(loads))
        members[i].append(rank)
        loads[rank] += jobs[i].n_parameters
    for rank in range(len(jobs), world):
        shared = [i for i in order if jobs[i].can_share]
        if shared:
            most = max(shared, key=lambda i: jobs[i].n_parameters / len(members[i]))
            members[most].append(rank)
    return [tuple(sorted(of_job)) for of_job in members]


def free_memory(device: str) -> int:
    """Bytes that this process may fill on the device."""
    where = torch.device(device)
    if where.type == "cuda":
        cached = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return torch.cuda.mem_get_info(where)[0] + cached
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
