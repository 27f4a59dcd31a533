"""Many layers from one pass of the language model: each is the one that its run alone trains."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from mxd_lens import CompareConfig, train, train_many
from mxd_lens.cli import main
from mxd_lens.data.activations import Reader
from mxd_lens.layers import answers, architectures
from mxd_lens.runs.config import ManyConfig
from mxd_lens.runs.plan import Job, Memory, deal, make_plan, memory
from mxd_lens.startup import Interrupted

from ..conftest import TINY_RUNS
from ..helpers import same

SIZES = {"k": [2, 3], "d_sae": 12, "training_tokens": 32 * 40}


def many(output: Path, **fields: Any) -> ManyConfig:
    return ManyConfig(**TINY_RUNS | SIZES | {"layers": [0, 1], "output": str(output)} | fields)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    layer = Path(folder) / "layer"
    return load_file(layer / "sae_weights.safetensors") | load_file(layer / "sparsity.safetensors")


def metadata(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "layer" / "cfg.json").read_text())


@pytest.mark.parametrize("cached", [False, True])
def test_each_is_the_layer_that_its_run_alone_trains(
    tiny_bridge, documents, tmp_path, monkeypatch, cached
):
    architectures = ["mxd", "topk_skip_transcoder", "batchtopk_transcoder", "topk", "dense"]
    kept = {"activations": str(tmp_path / "acts")} if cached else {}
    options = {"architectures": architectures, "seeds": [0, 4]} | kept
    n_passes = []
    read = Reader._run
    monkeypatch.setattr(Reader, "_run", lambda *a: n_passes.append(1) or read(*a))
    runs = many(tmp_path / "together", **options).runs()
    train_many(runs, tiny_bridge, documents)
    assert len(runs) == 36 and len(n_passes) < 60
    for run in many(tmp_path / "alone", **options).runs()[::5]:
        train(run, tiny_bridge, documents)
        together = run.output.replace("/alone/", "/together/")
        same(weights(together), weights(run.output))
        assert metadata(together) == metadata(run.output)
        assert {p.name for p in Path(together).iterdir()} == {
            p.name for p in Path(run.output).iterdir()
        }


def test_what_was_trained_alone_is_not_trained_again(tiny_bridge, documents, tmp_path, monkeypatch):
    runs = many(tmp_path).runs()
    train(runs[1], tiny_bridge, documents)
    seen = []
    step = SAETrainer.step
    monkeypatch.setattr(SAETrainer, "step", lambda self, b: seen.append(self) or step(self, b))
    train_many(runs, tiny_bridge, documents)
    assert len(set(map(id, seen))) == len(runs) - 1
    train_many(runs, tiny_bridge, documents)
    assert len(seen) == 40 * (len(runs) - 1)


def test_runs_stopped_at_different_steps_go_on_together(tiny_bridge, documents, tmp_path, at_step):
    first, *others = many(tmp_path / "whole").runs()
    train_many([first, *others], tiny_bridge, documents)
    runs = many(tmp_path / "stopped").runs()
    for some, step in ((runs[:1], 25), (runs[1:3], 12)):
        once = iter([signal.SIGINT])
        stop = lambda once=once: [os.kill(os.getpid(), number) for number in once]  # noqa: E731
        with at_step(step, stop), pytest.raises(Interrupted):
            train_many(some, tiny_bridge, documents)
    train_many(runs[:3], tiny_bridge, documents)  # from steps 26, 13 and 13 on
    train_many(runs, tiny_bridge, documents)
    for run in runs:
        same(weights(run.output), weights(run.output.replace("/stopped/", "/whole/")))
        assert not (Path(run.output) / "checkpoints").exists()


def test_a_resumed_run_has_the_model_read_little(
    tiny_bridge, documents, make_config, at_step, monkeypatch
):
    tokens = {"training_tokens": 32 * 800}
    cfg = make_config(**tokens)
    with at_step(700, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(Interrupted):
        train(cfg, tiny_bridge, documents)
    n_passes = []
    read = Reader._run
    monkeypatch.setattr(Reader, "_run", lambda *a: n_passes.append(1) or read(*a))
    train(cfg, tiny_bridge, documents)
    of_resumed = len(n_passes)
    whole = make_config(output=cfg.output + "-whole", **tokens)
    train(whole, tiny_bridge, documents)
    assert of_resumed < 300 and len(n_passes) - of_resumed > 800
    same(weights(cfg.output), weights(whole.output))


def test_one_that_diverges_leaves_the_others_theirs(tiny_bridge, documents, tmp_path):
    runs = [run for lr in (1e-2, 1e35) for run in many(tmp_path / f"{lr}", k=[3], lr=lr).runs()]
    with pytest.raises(ValueError, match=r"diverged.*lower lr of .*1e\+35/layer0.* \(1e\+35\)"):
        train_many(runs, tiny_bridge, documents)
    assert [run.finished for run in runs] == [True, True, False, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"batch_size": 64}, "differ in batch_size"), ({}, "need a folder each")],
)
def test_runs_that_cannot_go_together(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train_many([*many(tmp_path).runs(), *many(tmp_path, **fields).runs()])


class TestPlan:
    @staticmethod
    def job(n: int, can_share: bool = True) -> Job:
        return Job(layer=0, seed=0, n_parameters=n, largest=n, d_sae=1, can_share=can_share)

    @staticmethod
    def need(jobs: Any) -> Memory:
        return Memory(layers=sum(job.n_parameters for job in jobs), buffers=0, step=0, reading=0)

    def test_as_few_passes_as_fit(self):
        jobs = [self.job(n) for n in (40, 40, 40, 80, 10)]
        plan = make_plan(jobs, self.need, 100)
        assert [sorted(members) for members in plan.passes] == [[0, 1], [2], [3, 4]]
        assert plan.memory.total == 90

    def test_two_ranks_take_twice_as_much(self):
        plan = make_plan([self.job(n) for n in (40, 40, 40, 40)], self.need, 100, world=2)
        assert len(plan.passes) == 1 and plan.memory.total == 80

    def test_what_does_not_fit_alone_is_refused(self):
        with pytest.raises(ValueError, match=r"takes .* make it narrower"):
            make_plan([self.job(40), self.job(400)], self.need, 100)

    def test_what_a_step_computes_densely_counts_once(self, make_config):
        def step(*dense: int) -> int:
            jobs = [replace(self.job(40), dense_width=width) for width in dense]
            return memory(jobs, make_config(), d_pair=32, n_layers=1, itemsize=4, cached=False).step

        assert step(500, 300) - step(0) == 4 * 4 * 32 * 500

    def test_the_largest_are_dealt_first(self):
        assert deal([self.job(n) for n in (1, 5, 2, 4)], 2) == [(0,), (0,), (1,), (1,)]

    def test_ranks_to_spare_share_the_largest_that_can_be_shared(self):
        jobs = [self.job(9, can_share=False), self.job(8), self.job(2)]
        assert deal(jobs, 6) == [(0,), (1, 3, 4, 5), (2,)]
        assert deal(jobs[:1], 3) == [(0,)]


def test_what_may_be_shared():
    shared = {name for name in architectures() if answers(name).splits_batches}
    assert shared == {
        "mxd",
        "mxd_paper",
        "molt",
        "topk_transcoder",
        "topk_skip_transcoder",
        "dense",
    }


def test_a_stop_at_the_end_of_a_window_of_firings(
    tiny_bridge, documents, make_config, at_step, monkeypatch
):
    config = SAETrainerConfig.__init__
    window = {"feature_sampling_window": 20}
    monkeypatch.setattr(SAETrainerConfig, "__init__", lambda s, **k: config(s, **k | window))
    cfg = make_config()
    stop = iter([signal.SIGINT])
    with (
        at_step(19, lambda: [os.kill(os.getpid(), number) for number in stop]),
        pytest.raises(Interrupted),
    ):
        train(cfg, tiny_bridge, documents)
    train(cfg, tiny_bridge, documents)
    whole = make_config(output=cfg.output + "-whole")
    train(whole, tiny_bridge, documents)
    same(weights(cfg.output), weights(whole.output))


@pytest.mark.parametrize(
    ("layers", "kept"), [([6], True), (["all"], False), ([0, 1], False), (["6"], True)]
)
def test_activations_of_one_layer_are_kept(tmp_path, layers, kept):
    cfg = CompareConfig(output=str(tmp_path), layers=layers)
    assert (cfg.kept_activations is not None) == kept


def test_one_layer_is_not_probed_in_passing(tmp_path):
    said = f"--model m --dataset d --layers 0 --output {tmp_path} --probe demo:bbc"
    with pytest.raises(SystemExit, match=r"run `mxd-lens probe .* --data demo:bbc` once"):
        main(["train", *said.split()])


def test_normalised_activations_are_refused(make_config):
    options = '{"normalize_activations": "expected_average_only_in"}'
    with pytest.raises(ValueError, match="normalize_activations would be estimated"):
        make_config(architecture="topk", sae_options=options)
