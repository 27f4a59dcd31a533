"""Layers under torch.compile, and on a device that holds no numbers."""

from copy import deepcopy

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from tests.helpers import INFERENCE, RAGGED, TRAINING, make_layer, training_step

INFERENCE = [kind for kind in INFERENCE if kind not in RAGGED]  # whose shapes depend on the data
TRAINING = [kind for kind in TRAINING if kind not in RAGGED]


def compiled(module):
    """Without a graph break, and for any batch."""
    torch.compiler.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)


@pytest.mark.parametrize("kind", INFERENCE)
@torch.no_grad()
def test_inference_compiles_without_a_graph_break(kind):
    layer = make_layer(kind, 0.3, dtype="float32")
    fast = compiled(layer)
    for batch in [(9,), (5,), (2, 3)]:
        x = torch.randn(*batch, 5)
        torch.testing.assert_close(fast(x), layer(x))


@pytest.mark.parametrize("kind", TRAINING)
def test_gradients_compile_without_a_graph_break(kind):
    layer = make_layer(kind, 0.3, dtype="float32")
    fast = compiled(layer)
    used = {name: p for name, p in layer.named_parameters() if not name.endswith("_aux")}
    used = [p for p in used.values() if p.requires_grad]
    for n in (9, 5):
        x = torch.randn(n, 5)
        found = torch.autograd.grad(fast(x).square().sum(), used)
        torch.testing.assert_close(found, torch.autograd.grad(layer(x).square().sum(), used))


@pytest.mark.parametrize("kind", TRAINING)
def test_saelens_training_step_compiles_without_a_graph_break(kind):
    layer = make_layer(kind, 0.3, dtype="float32")
    plain, step = deepcopy(layer), compiled(layer.training_forward_pass)
    for n in (9, 5):
        batch = TrainStepInput(torch.randn(n, 9), {}, torch.zeros(11).bool(), 0, False)
        found, expected = step(batch), plain.training_forward_pass(batch)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(
            found.feature_acts.bool().float().sum(0), expected.feature_acts.bool().float().sum(0)
        )


@pytest.mark.parametrize("kind", TRAINING)
def test_a_training_step_needs_no_numbers(kind):
    """So nothing in it waits for the device, and no shape depends on the data."""
    layer = make_layer(kind, device="meta")
    out = training_step(layer, torch.randn(9, 5, device="meta"), torch.randn(9, 4, device="meta"))
    assert out.sae_out.shape == (9, 4) and out.feature_acts.shape == (9, 11)
    out.loss.backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


@pytest.mark.parametrize("kind", INFERENCE)
def test_inference_needs_no_numbers(kind):
    layer, x = make_layer(kind, device="meta"), torch.randn(2, 3, 5, device="meta")
    assert layer(x).shape == (2, 3, 4) and layer.encode(x).shape == (2, 3, 11)
