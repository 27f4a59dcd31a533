"""Tuning layers end to end, on a tiny model: the loss plainly, less of it, resumed."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from sae_lens import SAE

from mxd_lens import ManyConfig, train_many
from mxd_lens.analysis.in_model import divergences
from mxd_lens.models.splice import splice
from mxd_lens.runs import finetune
from mxd_lens.runs.config import finished_runs
from mxd_lens.runs.finetune import FinetuneConfig, Tuning, meaning_kept, run_finetune
from mxd_lens.runs.results import load_layer
from mxd_lens.startup import Interrupted

from ..conftest import TINY_RUNS
from ..helpers import BesideBos, same


@pytest.fixture
def folder(tiny_bridge, documents, tmp_path):
    options = {"architectures": ["mxd", "dense"], "k": [2], "training_tokens": 640}
    cfg = ManyConfig(**TINY_RUNS | options | {"layers": [0, 2], "output": str(tmp_path / "all")})
    train_many(cfg.runs(), tiny_bridge, documents)
    return tmp_path / "all"


@pytest.fixture
def make(folder, tmp_path):
    def make(name="tuned", **options):
        sizes = {
            "architecture": "mxd",
            "training_tokens": 40 * 8 * 4,
            "lm_batch_size": 4,
            "lr": 6e-3,
        }
        return FinetuneConfig(run=str(folder), output=str(tmp_path / name), **sizes | options)

    return make


def weights(path):
    return {p.parent.name: SAE.load_from_disk(p).state_dict() for p in sorted(path.glob("*/layer"))}


def test_layers_predict_more_like_the_original(make, tiny_bridge, documents, tmp_path):
    before = weights(tmp_path / "all")
    path = run_finetune(make(), tiny_bridge, documents)
    found = json.loads(path.read_text())
    lost = [found[when]["replaced"][-1]["kl"] for when in ("before", "after")]
    assert lost[1] < 0.8 * lost[0]
    assert found["meaning_kept"] == meaning_kept(found["before"], found["after"])
    runs = finished_runs(path.parent, one_mlp=False)
    assert [run.layer for run in runs] == [0, 2] and not (path.parent / "checkpoints").exists()
    layers = {run.layer: load_layer(run.layer_path) for run in runs}
    assert {sae.cfg.k for sae in layers.values()} == {2}
    same(weights(tmp_path / "all"), before)
    written = path.read_text()
    run_finetune(make(), tiny_bridge, documents)
    assert path.read_text() == written


def test_the_loss_is_the_spliced_models(make, folder, tiny_bridge):
    runs = [run for run in finished_runs(folder, one_mlp=False) if run.architecture == "mxd"]
    layers = {run.layer: load_layer(run.layer_path) for run in runs}
    tokens = tiny_bridge.to_tokens("the cat sat on a dog")
    original = tiny_bridge(tokens).log_softmax(-1)
    inside = {n: BesideBos(sae, tiny_bridge.blocks[n].mlp) for n, sae in layers.items()}
    with splice(tiny_bridge, inside):
        replaced = tiny_bridge(tokens).log_softmax(-1)
    expected = (original.exp() * (original - replaced)).sum(-1)[0, :-1].mean()
    torch.testing.assert_close(
        divergences(original, replaced).mean(), expected, rtol=1e-3, atol=1e-6
    )
    tuning = Tuning(make(reconstruction=0.5), tiny_bridge, layers, runs[0])
    assert tuning.train_on(tokens) == pytest.approx(expected.item(), rel=1e-3)
    assert tuning.train_on(tokens) < expected.item()


def test_what_is_interrupted_goes_on(make, tiny_bridge, documents, monkeypatch, tmp_path):
    run_finetune(make("whole"), tiny_bridge, documents)
    train_on, seen = Tuning.train_on, []

    def stopped(self, tokens):
        seen.append(self.step)
        if self.step == 17:
            signal.raise_signal(signal.SIGINT)
        return train_on(self, tokens)

    monkeypatch.setattr(finetune.Tuning, "train_on", stopped)
    with pytest.raises(Interrupted, match="goes on"):
        run_finetune(make("parts"), tiny_bridge, documents)
    assert all(p.requires_grad for p in tiny_bridge.parameters())
    run_finetune(make("parts"), tiny_bridge, documents)
    assert seen == list(range(40))
    same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_other_settings_are_another_folder(make, tiny_bridge, documents):
    run_finetune(make(training_tokens=64), tiny_bridge, documents)
    with pytest.raises(ValueError, match="lr"):
        run_finetune(make(training_tokens=64, lr=1.0), tiny_bridge, documents)
    with pytest.raises(ValueError, match="several layers for one MLP"):
        run_finetune(make("other", architecture=None), tiny_bridge, documents)


def test_experts_that_idle_are_not_kept():
    def measured(share, *alive):
        return {"share": share, "in_place": [{"alive_fraction": of_layer} for of_layer in alive]}

    before = measured(0.5, 1.0, 0.8)
    assert meaning_kept(before, measured(0.45, 0.9, 0.8)) is True
    assert meaning_kept(before, measured(0.44, 1.0, 0.8)) is False
    assert meaning_kept(before, measured(0.5, 1.0, 0.6)) is False
    assert meaning_kept(measured(None, None), measured(None, None)) is None
