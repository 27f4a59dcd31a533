"""What workers are started with, and how they end."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from mxd_lens.runs.workers import run_workers
from mxd_lens.startup import Interrupted


class Job:
    job_id = "1"
    paths = SimpleNamespace(stdout="log")

    def __init__(self, work):
        self.work = work

    def done(self):
        return True

    def exception(self):
        return None

    def result(self):
        return self.work()


@pytest.fixture
def started(monkeypatch):
    """The commands of the workers started, which work in this process."""
    commands = []

    class LocalExecutor:
        def __init__(self, folder, python):
            commands.append(python)

        def update_parameters(self, **_):
            pass

        def submit(self, work):
            return Job(work)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(LocalExecutor=LocalExecutor))
    monkeypatch.setattr(tqdm, "display", tqdm.display)
    return commands


def test_workers_share_the_gpus_and_the_threads(started, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_workers(lambda: "done", tmp_path, 3, own_gpu=True) == "done"
    assert [python.split()[1] for python in started] == [
        f"CUDA_VISIBLE_DEVICES={gpu}" for gpu in ("5", "GPU-abc", "5")
    ]
    assert {python.split()[2] for python in started} == {"OMP_NUM_THREADS=2"}
    started.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    run_workers(lambda: None, tmp_path, 1)
    assert started == [f"env CUDA_VISIBLE_DEVICES=5,GPU-abc OMP_NUM_THREADS=4 {sys.executable}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_worker_whose_time_is_up_is_interrupted(started, tmp_path, number):
    with pytest.raises(Interrupted) as interrupted:
        run_workers(lambda: os.kill(os.getpid(), number), tmp_path, 1)
    assert interrupted.value.number == signal.SIGTERM
