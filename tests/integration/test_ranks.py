"""Several processes, started as a user starts them: ranks of torchrun, workers of a comparison."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY_RUNS
from tests.helpers import same

SIZES = {"k": [2, 3], "d_sae": 12, "training_tokens": 32 * 40}


MANY = {
    **{"command": "compare", "layers": [1], "seeds": [0, 1], "training_tokens": 32 * 300},
    "architectures": ["mxd", "topk_transcoder", "dense"],
}
"""Ten runs of one layer."""

ROWS = 2 * 2 + 2
"""Of MxD in the printed tables: each k and seed, and the seeds' mean at each k."""


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    layer = Path(folder) / "layer"
    return load_file(layer / "sae_weights.safetensors") | load_file(layer / "sparsity.safetensors")


def metadata(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "layer" / "cfg.json").read_text())


@pytest.fixture
def run_on(llama_folder, text) -> Callable[..., subprocess.Popen]:
    """``run_on(n, command, **options)``: start mxd-lens on n ranks."""

    def start(n: int, output: Path, command: str = "train", **options: Any) -> subprocess.Popen:
        fields = TINY_RUNS | SIZES | {"layers": [0, 1], "output": output} | options
        fields |= {"model": llama_folder, "dataset": text}
        said = [str(x) for name, value in fields.items() for x in (f"--{name}", *_each(value))]
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"]
        started = [*(torchrun if n > 1 else []), "mxd_lens", command, *said]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-m", *started], env=env, **pipes)

    return start


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def workers_of(process: subprocess.Popen) -> list[int]:
    """Each is the child of one that watches over it."""
    return [worker for watch in children(process.pid) for worker in children(watch)]


def until_begun(process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/checkpoints/*/runner_cfg.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_ranks_train_the_layers_that_one_process_trains(run_on, tmp_path):
    """On two, and on three, to which four runs cannot be dealt evenly."""
    outputs = {n: finish(run_on(n, tmp_path / str(n))) for n in (1, 2, 3)}
    names = sorted(path.name for path in (tmp_path / "1").glob("layer*"))
    assert len(names) == 4
    rows = json.loads((tmp_path / "1" / "results.json").read_text())
    for n in (2, 3):
        for name in names:
            same(weights(tmp_path / str(n) / name), weights(tmp_path / "1" / name))
        assert json.loads((tmp_path / str(n) / "results.json").read_text()) == rows
        assert outputs[n][0].count("| MxD |") == outputs[1][0].count("| MxD |") == 4


def test_ranks_share_the_batches_of_one_run(run_on, tmp_path):
    one = {"layers": [1], "k": [3]}
    for n in (1, 3):
        finish(run_on(n, tmp_path / str(n), **one))
    alone, shared = weights(tmp_path / "1"), weights(tmp_path / "3")
    for name in alone:
        torch.testing.assert_close(shared[name], alone[name], rtol=1e-3, atol=2e-5)
    assert metadata(tmp_path / "3") == metadata(tmp_path / "1")


def test_a_rank_that_is_killed_ends_all_and_the_runs_go_on_with_another_number(run_on, tmp_path):
    long = {"training_tokens": 32 * 1500, "k": [3], "seeds": [0, 4]}
    process = run_on(3, tmp_path / "killed", **long)
    until_begun(process, tmp_path / "killed")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command goes on" in err
    finish(run_on(2, tmp_path / "killed", **long))
    finish(run_on(1, tmp_path / "whole", **long))
    for path in (tmp_path / "whole").glob("layer*"):
        same(weights(tmp_path / "killed" / path.name), weights(path))


@pytest.mark.parametrize("n", [2, 4])
def test_processes_share_a_comparison_and_one_may_be_killed(run_on, tmp_path, n):
    finish(run_on(1, tmp_path / "alone", **MANY))
    killed, *others = (run_on(1, tmp_path / "shared", **MANY) for _ in range(n))
    until_begun(killed, tmp_path / "shared")
    killed.kill()
    outputs = [finish(process)[0] for process in others]
    begun = [line for out in outputs for line in out.splitlines() if line.startswith("[")]
    assert len(begun) == len(set(begun)) <= 10
    rows = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("alone", "shared")]
    assert rows[0] == rows[1] and len(rows[0]["rows"]) == 10
    table = outputs[0][outputs[0].index("| layer |") :].splitlines()[:12]
    assert all(table == out[out.index("| layer |") :].splitlines()[:12] for out in outputs)


def logs(folder: Path) -> list[str]:
    return [path.read_text() for path in (folder / "workers").glob("*_log.out")]


def test_workers_share_a_comparison(run_on, tmp_path):
    finish(run_on(1, tmp_path / "alone", **MANY))
    out, _ = finish(run_on(1, tmp_path / "shared", **MANY, workers=2))
    rows = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("alone", "shared")]
    assert rows[0] == rows[1] and len(rows[0]["rows"]) == 10
    assert out.count("| MxD |") == ROWS
    begun = [re.findall(r"^\[(\d+)/10\]", log, re.M) for log in logs(tmp_path / "shared")]
    assert len(begun) == 2 and all(begun)
    assert sorted(int(run) for runs in begun for run in runs) == list(range(1, 11))
    assert all(f"worker {i} is local job" in out for i in (1, 2)) and "worker 3" not in out


def test_workers_end_with_the_command_and_one_may_be_killed(run_on, tmp_path):
    settings = MANY | {"architectures": ["mxd"], "workers": 2}
    process = run_on(1, tmp_path / "shared", **settings | {"training_tokens": 32 * 900})
    until_begun(process, tmp_path / "shared")
    workers = workers_of(process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in err
    assert any("training interrupted" in log for log in logs(tmp_path / "shared"))
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)

    process = run_on(1, tmp_path / "shared", **settings | {"training_tokens": 32 * 900})
    while not any("[" in log for log in logs(tmp_path / "shared")[2:]):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    out, err = finish(process)
    assert "worker 1 has failed" in err and out.count("| MxD |") == ROWS


def test_workers_that_all_fail_leave_a_sentence_and_their_log(run_on, tmp_path):
    process = run_on(1, tmp_path / "out", **MANY, workers=2, heldout_documents=10**6)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    said = err.splitlines()[-1]
    (log,) = (path for path in (tmp_path / "out" / "workers").glob("*.out") if str(path) in said)
    assert "all workers have failed" in said and "ValueError: " in said
    assert "Traceback" not in err and "Traceback" in log.read_text()


SLURM = {
    "sbatch": """
        env | grep ^SBATCH_ >$SLURM/env
        cp $1 $SLURM/script
        for i in $(seq 0 $(sed -n 's/^#SBATCH --array=0-\\(.*\\)%.*/\\1/p' $1)); do
            export SLURM_JOB_ID=$((8 + i)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i
            setsid bash $1 >$SLURM/printed 2>&1 &
            echo $! >$SLURM/7_$i
        done
        echo Submitted batch job 7
    """,
    "srun": """
        log=${3//%A/$SLURM_ARRAY_JOB_ID}
        log=${log//%a/$SLURM_ARRAY_TASK_ID}
        exec >>${log//%t/0} 2>&1
        shift 3
        exec "$@"
    """,
    "sacct": "echo 'JobID|State|NodeList'",
    "scancel": "kill -TERM -$(cat $SLURM/$1)",
}
"""As much of Slurm as it takes to run jobs here."""


def test_workers_are_jobs_of_slurm(run_on, tmp_path, monkeypatch):
    """What the environment says to sbatch is not said otherwise by submitit."""
    for name, script in SLURM.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM", str(tmp_path))
    said = {"PARTITION": "small", "TIMELIMIT": "60", "GPUS": "1", "MEM": "8G", "CPUS_PER_TASK": "2"}
    for name, value in said.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    settings = MANY | {"architectures": ["mxd"], "workers": 2, "executor": "slurm"}
    out, _ = finish(run_on(1, tmp_path / "out", **settings))
    assert out.count("| MxD |") == ROWS and "worker 2 is slurm job 7_1" in out
    assert any("[1/4]" in log for log in logs(tmp_path / "out"))
    assert (tmp_path / "env").read_text().count("SBATCH_") == len(said)
    script = (tmp_path / "script").read_text()
    flags = set(re.findall(r"^#SBATCH --([\w-]+)", script, re.M))
    assert not flags & {
        name.lower().replace("_", "-") for name in [*said, "time", "account", "wckey"]
    }


def test_a_rank_that_trains_nothing_reads(run_on, tmp_path):
    """SAELens' own layers are not shared: the second rank has none."""
    one = {"layers": [1], "k": [3], "architectures": ["topk"]}
    for n in (1, 2):
        for kept in ("text", "kept"):
            where = {"activations": tmp_path / f"acts{n}"} if kept == "kept" else {}
            finish(run_on(n, tmp_path / f"{kept}{n}", **one, **where))
    for kept in ("text", "kept"):
        same(weights(tmp_path / f"{kept}2"), weights(tmp_path / f"{kept}1"))
