"""Every stage on a pretended GPU: what the CPU computes, and how often the host waits."""

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from sae_lens.evals import get_eval_everything_config
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

from mxd_lens import MxD, load_model, splice, train
from mxd_lens.analysis.saelens_evals import run_evals
from mxd_lens.cli import main
from mxd_lens.data.activations import Reader
from mxd_lens.models.site import Site
from mxd_lens.runs.analyse import (
    ExpertsConfig,
    ProbeConfig,
    SteerConfig,
    run_experts,
    run_probe,
    run_steer,
)
from mxd_lens.runs.compare import compare
from mxd_lens.runs.trainer import RunTrainer
from mxd_lens.startup import Interrupted

from ..helpers import (
    TRAINING,
    close32,
    make_layer,
    open_reader,
    random_layer,
    substituted,
    training_step,
)
from ..pretended_gpu import DEVICE, pretended_gpu

RECIPES = ["mxd", "mxd_paper", "topk_transcoder", "topk_skip_transcoder", "topk", "dense"]
RECIPES += ["batchtopk_mxd"]
COMPONENTS = "model_bridge/generalized_components"
SHORT = {"training_tokens": 32 * 24}


@pytest.fixture
def gpu():
    with pretended_gpu() as syncs:
        yield syncs


@pytest.fixture
def bridge_on_gpu(gpu, llama_folder):
    return load_model(str(llama_folder), device=DEVICE)


@pytest.fixture
def losses(monkeypatch):
    """Of every training step so far."""
    seen = []
    step = RunTrainer.step

    def recording(self, batch):
        output = step(self, batch)
        if output is not None:
            seen.append({name: loss.item() for name, loss in output.losses.items()})
        return output

    monkeypatch.setattr(RunTrainer, "step", recording)
    return seen


def weights(cfg):
    return load_file(cfg.layer_path / "sae_weights.safetensors")


class TestTheDevice:
    def test_tensors_of_two_devices_do_not_meet(self, gpu):
        here, there = torch.ones(3, device=DEVICE), torch.ones(3)
        for wrong in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: there[here.long()],
            lambda: there.index_add_(0, here.long(), there),
            lambda: torch.where(here > 0, here, there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        assert (here + torch.tensor(1.0)).tolist() == [2, 2, 2]
        assert here[torch.tensor([0, 2])].tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("operation", "syncs"),
        [
            (lambda x: x.sum().item(), ["number"]),
            (lambda x: bool((x > 0).all()), ["number"]),
            (lambda x: x.tolist(), ["download"]),
            (lambda x: x.cpu(), ["download"]),
            (lambda x: torch.tensor(1.0, device=x.device), ["upload"]),
            (lambda x: torch.ones(3).to(x.device), ["upload"]),
            (lambda x: torch.ones(3).to(x.device, non_blocking=True), []),
            (lambda x: x.copy_(torch.ones(4)), ["upload"]),
            (lambda x: x[x > 0], ["shape"]),
            (lambda x: x[torch.tensor([0, 1])], ["upload"]),
            (lambda x: (x > 0).nonzero(), ["shape"]),
            (lambda x: x.long().bincount(), ["number"]),
            (lambda x: x.repeat_interleave(x.long()), ["shape"]),
            (lambda x: x.repeat_interleave(x.long(), output_size=4), []),
            (lambda x: x.__setitem__(x > 0, 0), []),
            (lambda x: x.new_zeros(3).add_(torch.arange(3, device=x.device)).topk(2), []),
        ],
    )
    def test_what_the_host_waits_for(self, gpu, operation, syncs):
        x = torch.ones(4, device=DEVICE)
        gpu.clear()
        operation(x)
        assert [sync.what for sync in gpu.elements()] == syncs

    def test_nothing_of_it_is_left(self):
        load = torch.load
        with pretended_gpu():
            layer = make_layer("training_mxd").to(DEVICE)
            layer(torch.randn(3, 5, device=DEVICE)).sum().backward()
            assert layer.W_dec.grad.device == torch.device(DEVICE)
        with pytest.raises(NotImplementedError, match="'gpu' backend"):
            torch.ones(3, device=DEVICE)
        assert torch.load is load and not torch.accelerator.is_available()
        assert torch.autograd.is_multithreading_enabled()
        layer = make_layer("training_mxd")
        layer(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
        assert layer.W_dec.grad.isfinite().all()


@pytest.mark.parametrize("kind", TRAINING)
def test_losses_and_gradients_of_a_step(gpu, kind):
    layer = make_layer(kind)
    pairs = torch.randn(20, 9, dtype=torch.float64)
    twin = make_layer(kind).to(DEVICE)
    twin.load_state_dict(layer.state_dict())
    for one, device in ((layer, "cpu"), (twin, DEVICE)):
        training_step(one, *pairs.to(device).split([5, 4], dim=-1)).loss.backward()
    for here, there in zip(layer.parameters(), twin.parameters(), strict=True):
        assert (here.grad is None) == (there.grad is None)
        if here.grad is not None:
            close32(there.grad.cpu(), here.grad)
    assert twin.cfg.device == DEVICE


class TestTraining:
    @pytest.mark.parametrize("architecture", RECIPES)
    def test_as_on_the_cpu(
        self, tiny_bridge, bridge_on_gpu, documents, make_config, tmp_path, losses, architecture
    ):
        fields = SHORT | {"architecture": architecture, "d_sae": 32}
        cpu = make_config(**fields)
        train(cpu, tiny_bridge, documents)
        on_cpu, losses[:] = list(losses), []
        gpu = make_config(**fields, device=DEVICE, output=str(tmp_path / "gpu"))
        layer = train(gpu, bridge_on_gpu, documents)
        assert layer.W_dec.device == torch.device(DEVICE)
        assert len(losses) == 24
        close32(losses, on_cpu)
        close32(weights(gpu), weights(cpu))

    def test_beside_a_model_on_the_cpu(self, gpu, tiny_bridge, documents, make_config, tmp_path):
        cpu = make_config(**SHORT, llm_device="cpu")
        gpu = replace(cpu, device=DEVICE, output=str(tmp_path / "gpu"))
        for cfg in (cpu, gpu):
            train(cfg, tiny_bridge, documents)
        close32(weights(gpu), weights(cpu))

    def test_on_activations_kept_on_disk(
        self, tiny_bridge, bridge_on_gpu, documents, make_config, tmp_path
    ):
        cpu = make_config(**SHORT, activations=str(tmp_path / "by_cpu"))
        here = {"activations": str(tmp_path / "by_gpu"), "output": str(tmp_path / "gpu")}
        gpu = replace(cpu, device=DEVICE, **here)
        train(cpu, tiny_bridge, documents)
        train(gpu, bridge_on_gpu, documents)
        close32(weights(gpu), weights(cpu))

    @pytest.mark.parametrize("architecture", ["mxd", "topk"])
    def test_a_run_that_was_stopped_goes_on(
        self, tiny_bridge, bridge_on_gpu, documents, make_config, tmp_path, at_step, architecture
    ):
        cpu = make_config(**SHORT, architecture=architecture)
        train(cpu, tiny_bridge, documents)
        fields = {"architecture": architecture, "device": DEVICE, "output": str(tmp_path / "gpu")}
        gpu = make_config(**SHORT, **fields)
        with at_step(17, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(Interrupted):
            train(gpu, bridge_on_gpu, documents)
        train(gpu, bridge_on_gpu, documents)
        close32(weights(gpu), weights(cpu))


WAITS = {
    "mxd": {},
    "topk_skip_transcoder": {},
    "topk": {("mxd_lens", "layers/sae.py:training_forward_pass", "number"): 1},
    "batchtopk_mxd": {("mxd_lens", "layers/batch_topk.py:largest", "shape"): 1},
}
"""In a training step, by architecture: whether any unit is dead, which decides between a dense step
and a sparse one; and how many activations come into question, for codes that are ragged."""
PASS_WAITS = {
    ("mxd_lens", "data/activations.py:_not_finite", "number"): 1,
    ("transformer_lens", f"{COMPONENTS}/attention.py:_update_kv_cache", "upload"): 4,
}
"""In a pass of the language model up to layer 1: whether its activations are finite, before they
are handed out; keys and values of each layer, which Transformers begins with an empty list."""
TEN_STEPS_WAIT = {("mxd_lens", "runs/trainer.py:_update_pbar", "download"): 1}
"""The losses that the progress bar shows."""


def by_line(syncs):
    """Counted without the lines' numbers, which any edit moves."""
    counts = Counter()
    for sync, n in syncs.items():
        counts[sync.package, sync.function, sync.what] += n
    return counts


@pytest.mark.parametrize("architecture", WAITS)
def test_how_often_training_waits(
    bridge_on_gpu, gpu, documents, make_config, monkeypatch, architecture
):
    """Eight steps between two checkpoints, one showing its losses: none waits for what SAELens
    does. The mask of dead units, counts of firings, the norm that gradients are clipped to and
    Adam's count of steps stay on the device, and indices of a batch are sent without waiting."""
    before, steps, passes = [], [], []
    step, run = RunTrainer.step, Reader._run

    def stepping(self, batch):
        before.append((Counter(gpu), len(passes)))
        output = step(self, batch)
        steps.append(by_line(gpu - before[-1][0]))
        return output

    monkeypatch.setattr(RunTrainer, "step", stepping)
    monkeypatch.setattr(Reader, "_run", lambda *args: passes.append(args) or run(*args))
    train(make_config(device=DEVICE, architecture=architecture, d_sae=32), bridge_on_gpu, documents)
    assert steps == [WAITS[architecture]] * 40
    (first, n_first), (last, n_last) = before[12], before[20]
    expected = Counter(TEN_STEPS_WAIT)
    for waits, n in ((WAITS[architecture], 8), (PASS_WAITS, n_last - n_first)):
        expected.update({line: n * of_one for line, of_one in waits.items()})
    assert n_last > n_first and by_line(last - first) == expected


class TestSpliced:
    @pytest.mark.parametrize("name", ["tiny_hooked", "tiny_bridge"])
    def test_in_place_of_an_mlp(self, gpu, request, tokens, name):
        lm = request.getfixturevalue(name)
        mxd = random_layer("mxd", lm)
        expected = substituted(lm, tokens, {Site.at(lm, 1).hooks: mxd})
        lm.to(DEVICE)
        mxd.to(DEVICE)
        with splice(lm, {1: mxd}):
            close32(lm(tokens.to(DEVICE)).cpu(), expected)
            _, cache = lm.run_with_cache(tokens.to(DEVICE))
        codes = cache["blocks.1.mlp.hook_codes"]
        assert codes.values.device == codes.to_dense().device == torch.device(DEVICE)
        lm.blocks[1].mlp = mxd
        close32(lm(tokens.to(DEVICE)).cpu(), expected)

    def test_the_mlp_itself(self, bridge_on_gpu):
        mxd = MxD.from_mlp(bridge_on_gpu.blocks[1].mlp)
        x = torch.randn(2, 7, 16).to(DEVICE)
        close32(mxd(x).cpu(), bridge_on_gpu.blocks[1].mlp.original_component(x).cpu())


def agree(found, expected):
    """JSON: numbers to float32's tolerance, and all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            agree(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            agree(one, other)
    else:
        number = isinstance(expected, float)
        assert found == (pytest.approx(expected, rel=1e-3, abs=1e-4) if number else expected)


@pytest.mark.parametrize(
    "where",
    [
        {"device": DEVICE},
        {"device": DEVICE, "llm_device": "cpu"},
        {"device": "cpu", "llm_device": DEVICE},
    ],
    ids=lambda where: "-".join(where.values()),
)
class TestAnalyses:
    @pytest.fixture
    def analysed(self, gpu, where, llama_folder, text, make_config, tmp_path, edit_json):
        """``analysed(of, *files)``: do it with two runs of the same layers, on the CPU and
        elsewhere, and compare what their files say."""
        on_cpu, elsewhere = tmp_path / "cpu", tmp_path / "elsewhere"
        common = {"model": str(llama_folder), "dataset": text}
        for name in ("mxd", "topk"):
            train(make_config(**common, architecture=name, output=str(on_cpu / name)))
        shutil.copytree(on_cpu, elsewhere)
        for path in elsewhere.glob("*/runner_cfg.json"):
            edit_json(path, output=str(path.parent), **where)

        def analyse(of, *files):
            gpu.clear()
            of(str(on_cpu))
            assert not gpu
            of(str(elsewhere))
            assert gpu
            for path in [on_cpu / name / file for file in files for name in ("mxd", "topk")]:
                other = elsewhere / path.relative_to(on_cpu)
                agree(json.loads(other.read_text()), json.loads(path.read_text()))

        return analyse

    def test_probe(self, analysed, labelled):
        asked = {"data": [labelled], "n_texts": 40, "n_splits": 1}
        analysed(lambda folder: run_probe(ProbeConfig(run=folder, **asked)), "probe.json")

    def test_evaluate_and_experts_and_their_page(self, analysed, offline):
        def described(folder):
            asked = {"n_tokens": 600, "sample_tokens": 4, "prompt": "the cat"}
            for path in run_experts(ExpertsConfig(run=folder, **asked)):
                main(["evaluate", str(path.parent)])
                main(["report", str(path.parent)])

        analysed(described, "experts.json", "results.json")

    @pytest.mark.parametrize("edit", ["direction", "activation"])
    def test_steer(self, analysed, offline, edit):
        asked = {"n_samples": 2, "sample_tokens": 4, "prompt": "the cat", "edit": edit}
        asked |= {"experts": [1, 5], "strengths": [0.5]}
        analysed(lambda folder: run_steer(SteerConfig(run=folder, **asked)), "steering.json")


def test_compare(tiny_bridge, bridge_on_gpu, documents, make_compare, tmp_path):
    cpu = make_compare(architectures=["mxd", "dense"], output=str(tmp_path / "cpu"), k=[2])
    gpu = replace(cpu, device=DEVICE, output=str(tmp_path / "gpu"))
    agree(compare(gpu, bridge_on_gpu, documents), compare(cpu, tiny_bridge, documents))


def test_saelens_evaluations(gpu, tiny_bridge, documents):
    mxd = random_layer("mxd")
    config = get_eval_everything_config(batch_size_prompts=4, n_eval_reconstruction_batches=1)
    config.n_eval_sparsity_variance_batches = 1
    found = {}
    for device in ("cpu", DEVICE):
        tiny_bridge.to(device)
        mxd.to(device)
        store = open_reader([Site.at(tiny_bridge, 1)], documents).store
        found[device], _ = run_evals(mxd, store, tiny_bridge, ActivationScaler(), config)
    agree(found[DEVICE], found["cpu"])
