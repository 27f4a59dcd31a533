"""Processes that share a task out among them, on this machine or as jobs of Slurm, by submitit."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from mxd_lens import startup

T = TypeVar("T")

Where = Literal["local", "slurm"]

YEAR = 365 * 24 * 60
"""Minutes that workers on this machine have; submitit's own limit is of two."""

PATIENCE = 10
"""Seconds between two signals to workers that are to end: a checkpoint may take so long."""


def run_workers(
    task: Callable[[], T], folder: Path, n: int, where: Where = "local", *, own_gpu: bool = False
) -> T:
    """What the first worker returns that comes to the end of a task; the others are ended then.

    Args:
        task: shared out by itself, so that whoever comes to its end has waited for all of it.
        folder: of the logs, and of what submitit keeps.
        own_gpu: give each worker on this machine one of the GPUs, in turn, and not all.

    Raises:
        ValueError: no worker can be started, or none has come to the end; names a log.
    """
    if where == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ValueError(
            "--executor slurm needs sbatch and srun, which are not here: say it on a machine "
            "that submits jobs to Slurm"
        )
    start = _start_on_slurm if where == "slurm" else partial(_start_here, own_gpu=own_gpu)
    jobs: list[Any] = []
    try:
        for job in start(partial(_work, task), folder, n):
            jobs.append(job)
            print(f"worker {len(jobs)} is {where} job {job.job_id}: {job.paths.stdout}", flush=True)
        return _first(jobs)
    finally:
        _end(jobs, where)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--workers needs submitit: pip install 'mxd-lens[workers]'") from error
    return submitit


def _work(task: Callable[[], T]) -> T:
    """In a worker: SIGTERM, and what announces the end of a job's time, leave a checkpoint."""
    startup.progress_in_lines()
    last_call = {signal.SIGUSR2: lambda *_: signal.raise_signal(signal.SIGTERM)}
    with startup.raise_on_signals(), startup.handling(last_call):
        return task()


def _start_here(
    work: Callable[[], Any], folder: Path, n: int, *, own_gpu: bool = False
) -> Iterator[Any]:
    submitit = _submitit()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    threads = os.environ.get("OMP_NUM_THREADS", max(1, torch.get_num_threads() // n))
    for i in range(n):
        seen = gpus[i % len(gpus)] if own_gpu else ",".join(gpus)
        env = ["env", f"CUDA_VISIBLE_DEVICES={seen}", f"OMP_NUM_THREADS={threads}"]
        executor = submitit.LocalExecutor(folder, python=shlex.join([*env, sys.executable]))
        executor.update_parameters(timeout_min=YEAR, stderr_to_stdout=True)
        # Ctrl-C in a terminal comes to all: what watches over a worker would kill it at once.
        with startup.handling({signal.SIGINT: signal.SIG_IGN}):
            job = executor.submit(work)
        yield job


def _start_on_slurm(work: Callable[[], Any], folder: Path, n: int) -> list[Any]:
    executor = _submitit().SlurmExecutor(folder)
    # Not submitit's five minutes and accounting key, but the environment's or the cluster's.
    executor.update_parameters(job_name="mxd-lens", time=None, wckey=None, stderr_to_stdout=True)
    try:
        return executor.submit_array([work] * n)
    except RuntimeError as error:
        raise ValueError(f"sbatch has refused the workers: {error}") from error


def _first(jobs: list[Any]) -> Any:
    """The result of the first job that has one; ValueError if all have ended without."""
    waiting = dict(enumerate(jobs, 1))
    said = ""
    while waiting:
        for number, job in list(waiting.items()):
            if not job.done():
                continue
            del waiting[number]
            if job.exception() is None:
                return job.result()
            lines = (job.stdout() or "").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            said = f"{job.paths.stdout} ends with {last!r}"
            print(f"worker {number} has failed: {said}", file=sys.stderr, flush=True)
        time.sleep(1)
    raise ValueError(
        f"all workers have failed: {said}; the same command goes on with what is not finished"
    )


def _end(jobs: list[Any], where: Where) -> None:
    """End the jobs that are still there; those on this machine may write a checkpoint first."""
    running = [job for job in jobs if not job.done()]
    if where == "slurm":
        for job in running:
            job.cancel(check=False)
        return
    for second in range(6 * PATIENCE):
        running = [job for job in running if not job.done()]
        for job in running if second % PATIENCE == 0 else ():
            os.kill(int(job.job_id), signal.SIGTERM)  # which submitit hands on
        if not running:
            return
        time.sleep(1)
    print(f"still running: {', '.join(job.job_id for job in running)}", file=sys.stderr)
