"""Several processes, started as a user starts them: ranks of torchrun, workers of a comparison."""

from __future__ import annotations

import json
import os
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
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*/checkpoints/*/runner_cfg.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command goes on" in err
    finish(run_on(2, tmp_path / "killed", **long))
    finish(run_on(1, tmp_path / "whole", **long))
    for path in (tmp_path / "whole").glob("layer*"):
        same(weights(tmp_path / "killed" / path.name), weights(path))


def test_processes_share_a_comparison_and_one_may_be_killed(run_on, tmp_path):
    settings = {
        "layers": [1],
        "architectures": ["mxd", "topk_transcoder", "dense"],
        "seeds": [0, 1],
    }
    settings |= {"command": "compare", "training_tokens": 32 * 300}
    finish(run_on(1, tmp_path / "alone", **settings))
    killed, *others = (run_on(1, tmp_path / "shared", **settings) for _ in range(3))
    while not list((tmp_path / "shared").glob("*/checkpoints/*/runner_cfg.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    outputs = [finish(process)[0] for process in others]
    begun = [line for out in outputs for line in out.splitlines() if line.startswith("[")]
    assert len(begun) == len(set(begun)) <= 10
    rows = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("alone", "shared")]
    assert rows[0] == rows[1] and len(rows[0]["rows"]) == 10
    table = outputs[0][outputs[0].index("| layer |") :].splitlines()[:12]
    assert all(table == out[out.index("| layer |") :].splitlines()[:12] for out in outputs)


def test_a_rank_that_trains_nothing_reads(run_on, tmp_path):
    """SAELens' own layers are not shared: the second rank has none."""
    one = {"layers": [1], "k": [3], "architectures": ["topk"]}
    for n in (1, 2):
        for kept in ("text", "kept"):
            where = {"activations": tmp_path / f"acts{n}"} if kept == "kept" else {}
            finish(run_on(n, tmp_path / f"{kept}{n}", **one, **where))
    for kept in ("text", "kept"):
        same(weights(tmp_path / f"{kept}2"), weights(tmp_path / f"{kept}1"))
