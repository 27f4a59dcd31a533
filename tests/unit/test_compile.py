"""Layers under torch.compile, and on a device that holds no numbers."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from mxd_lens import (
    MxD,
    MxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingMxD,
    TrainingMxDConfig,
    TrainingTopKSkipTranscoder,
    TrainingTopKSkipTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
)

from ..conftest import randomise

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"d_in": 6, "d_out": 4, "d_sae": 13, "k": 3}
LAYERS = [
    (MxD, MxDConfig, {"d_hidden": 7}),
    (TopKTranscoder, TopKTranscoderConfig, {}),
    (TopKSkipTranscoder, TopKSkipTranscoderConfig, {}),
]
TRAINING_LAYERS = [
    (TrainingMxD, TrainingMxDConfig, {"d_hidden": 7, "recipe": "centred"}),
    (TrainingMxD, TrainingMxDConfig, {"d_hidden": 7, "recipe": "paper", "gated": False}),
    (TrainingTopKTranscoder, TrainingTopKTranscoderConfig, {}),
    (TrainingTopKSkipTranscoder, TrainingTopKSkipTranscoderConfig, {}),
]


def make(cls, config, fields, device="cpu"):
    return cls(config(**SHAPE, **fields, device=device))


def compiled(layer):
    """Without a graph break, and for any batch."""
    torch.compiler.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[0].__name__)
@torch.no_grad()
def test_inference_compiles_without_a_graph_break(layer):
    layer = make(*layer)
    randomise(layer)
    fast = compiled(layer)
    for batch in [(9,), (5,), (2, 3)]:
        x = torch.randn(*batch, 6)
        torch.testing.assert_close(fast(x), layer(x))


@pytest.mark.parametrize("layer", TRAINING_LAYERS, ids=lambda layer: layer[0].__name__)
def test_gradients_compile_without_a_graph_break(layer):
    layer = make(*layer)
    randomise(layer)
    fast = compiled(layer)
    for n in (9, 5):
        x = torch.randn(n, 6)
        used = {name: p for name, p in layer.named_parameters() if not name.endswith("_aux")}
        used = {name: p for name, p in used.items() if p.requires_grad}
        found = torch.autograd.grad(fast(x).square().sum(), list(used.values()))
        expected = torch.autograd.grad(layer(x).square().sum(), list(used.values()))
        for name, ours, theirs in zip(used, found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layer", TRAINING_LAYERS, ids=lambda layer: layer[0].__name__)
def test_a_training_step_needs_no_numbers(layer):
    """So nothing in it waits for the device, and no shape depends on the data."""
    layer = make(*layer, device="meta")
    batch = torch.randn(9, 10, device="meta")
    out = layer.training_forward_pass(TrainStepInput(batch, {}, None, 0, False))
    assert out.sae_out.shape == (9, 4) and out.feature_acts.shape == (9, 13)
    out.loss.backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[0].__name__)
def test_inference_needs_no_numbers(layer):
    layer = make(*layer, device="meta")
    x = torch.randn(2, 3, 6, device="meta")
    assert layer(x).shape == (2, 3, 4) and layer.encode(x).shape == (2, 3, 13)
