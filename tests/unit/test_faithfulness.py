"""Faithfulness and gate ablations, against the same numbers computed plainly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.data.activations import activations_store
from mxd_lens.data.reading import read_heldout
from mxd_lens.layers import layer_of
from mxd_lens.layers.mlp import read_mlp
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.site import Site
from mxd_lens.models.splice import splice

from ..helpers import STORE, random_layer

OF_EXPERTS = ("l0", "alive_fraction", "always_on", "experts_cosine")
OF_GATE = ("ce_mean_gate", "ce_shuffled_gate", "ce_shuffled_gate_matched")


@pytest.fixture
def heldout(documents):
    return documents.select(range(40))


def test_an_exact_copy_is_faithful_and_its_experts_mean_nothing(tiny_bridge, heldout):
    mxd = MxD.from_mlp(tiny_bridge.blocks[1].mlp, d_sae=8, k=2)
    mxd.cfg.metadata = random_layer("mxd").cfg.metadata
    row, density = evaluate(tiny_bridge, mxd, heldout, n_sequences=8, batch_size=4)
    assert row["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert [row["kl"], row["nmse"], row["fvu"]] == pytest.approx([0] * 3, abs=1e-5)
    for name in (*OF_GATE, "ce_replaced_all_positions"):
        assert row[name] == pytest.approx(row["ce_original"], abs=1e-5)
    assert [row[name] for name in OF_EXPERTS] == [2, 0.25, 2, pytest.approx(1)]
    assert density.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    nothing = ("share", "jacobian_gate_share", "ce_increase", "ce_floor", "kl_floor")
    assert [row[name] for name in nothing] == pytest.approx([0] * 5, abs=1e-5)
    assert row["jacobian_cosine"] == pytest.approx(1, abs=1e-5)
    json.dumps(row, allow_nan=False)


def test_a_decorative_gate_carries_nothing(tiny_bridge, heldout):
    """The whole MLP is there whatever fires: what expert is on changes it by a thousandth."""
    mxd = MxD.from_mlp(tiny_bridge.blocks[1].mlp, d_sae=40, k=40)
    mxd.cfg.metadata = random_layer("mxd").cfg.metadata
    mxd.W_enc.data.normal_(std=1e-3)
    mxd.b_enc.data.fill_(1 / 40)
    mxd.W_dec.data += 1e-2 * torch.randn_like(mxd.W_dec)
    row, _ = evaluate(tiny_bridge, mxd, heldout, n_sequences=8, batch_size=4)
    assert row["ce_recovered"] > 0.95 and row["jacobian_cosine"] > 0.95
    assert abs(row["share"]) < 0.03 and row["jacobian_gate_share"] < 0.01


def test_a_planted_layers_experts_do_everything(tiny_bridge_gpt2, heldout):
    """An MLP of rectified units is a transcoder of them all. Its mean output taken out, nothing is
    left of it without the choice of units."""
    mlp = tiny_bridge_gpt2.blocks[1].mlp
    mlp.original_component.act = torch.nn.ReLU()
    weights, site = read_mlp(mlp), Site.at(tiny_bridge_gpt2, 1)
    read = read_heldout(site, heldout, context_size=8, device="cpu", n_sequences=8, batch_size=4)
    mean = torch.cat([pair[site.hook_out] for pair in read.pairs]).mean(0)
    sae = random_layer("topk_transcoder", d_sae=weights.shape.d_hidden, k=weights.shape.d_hidden)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        of_mlp = name.replace("enc", "in").replace("dec", "out")
        getattr(sae, name).data.copy_(getattr(weights, of_mlp))
    sae.b_dec.data -= mean
    mlp.original_component.c_proj.bias.data -= mean
    row, _ = evaluate(tiny_bridge_gpt2, sae, heldout, n_sequences=8, batch_size=4)
    whole = ("share", "ce_recovered", "jacobian_gate_share", "jacobian_gate_cosine")
    assert [row[name] for name in whole] == pytest.approx([1] * 4, abs=1e-3)


def test_what_follows_from_the_sequences_own_numbers(tiny_bridge, heldout):
    row, _ = evaluate(tiny_bridge, random_layer("mxd"), heldout, n_sequences=8, batch_size=4)
    of_each = {name: np.array(sums) for name, sums in row["sequences"].items()}
    assert {len(sums) for sums in of_each.values()} == {8}
    n = of_each["tokens"].sum()
    for name in ("ce_original", "ce_replaced", "ce_mean_gate", "ce_zero_ablation", "kl"):
        assert of_each[name].sum() / n == pytest.approx(row[name])
    lost = row["ce_zero_ablation"] - row["ce_original"]
    assert row["share"] == pytest.approx((row["ce_mean_gate"] - row["ce_replaced"]) / lost)
    for name, value in (("ce_increase", row["ce_increase"]), ("kl", row["kl"])):
        low, high = row[f"{name}_interval"]
        assert low < value < high
    sums = []
    for bins in (row["by_frequency"], row["by_position"]):
        tokens = [of_bin["tokens"] for of_bin in bins]
        assert 0 < sum(tokens) < n  # what a special token predicts is none of the layer's doing
        sums += [np.dot(tokens, [of_bin[name] for of_bin in bins]) for name in bins[0]][3:]
    assert sums[: len(sums) // 2] == pytest.approx(sums[len(sums) // 2 :])


def test_it_takes_as_many_sequences_as_it_is_asked_for(tiny_bridge, heldout):
    """And not whole batches of them."""
    mxd = random_layer("mxd")
    few, more = (
        evaluate(tiny_bridge, mxd, heldout, n_sequences=n, batch_size=4)[0]["sequences"]
        for n in (6, 8)
    )
    for name in ("ce_original", "ce_replaced", "kl", "tokens"):
        assert len(few[name]) == 6
        assert few[name] == pytest.approx(more[name][:6], abs=1e-4)


@pytest.mark.parametrize(
    "name", ["mxd", "jumprelu_mxd", "molt", "topk_skip_transcoder", "topk", "dense"]
)
def test_measurements_are_those_of_plain_passes(tiny_bridge, heldout, name):
    sae, site = random_layer(name, d_sae=20), Site.at(tiny_bridge, 1)
    options = {"n_sequences": 4, "n_tokens": 20, "batch_size": 4}
    row, density = evaluate(tiny_bridge, sae, heldout, **options)
    read = read_heldout(site, heldout, context_size=8, device="cpu", **options)
    assert evaluate(tiny_bridge, sae, read)[0] == evaluate(tiny_bridge, sae, read)[0] == row
    tokens = activations_store([site], heldout, **STORE).get_batch_tokens()
    ordinary = tokens > 2
    predicted = ordinary[:, 1:]
    assert not ordinary.all()

    def ce(logits):
        log_probs = logits[:, :-1].log_softmax(-1)
        return -log_probs.gather(-1, tokens[:, 1:, None])[..., 0][predicted].mean().item()

    def replaced(y, where=ordinary):
        def replace(original, hook):
            return torch.where(where[..., None], y, original)

        return tiny_bridge.run_with_hooks(tokens, fwd_hooks=[(site.hook_out, replace)])

    original, cache = tiny_bridge.run_with_cache(tokens)
    x, y = cache[sae.cfg.metadata.hook_name], cache[site.hook_out]
    acts, y_hat = sae.encode(x)[ordinary], sae(x)
    if name == "topk":
        everywhere = replaced(y_hat, torch.ones_like(ordinary))
    else:
        with splice(tiny_bridge, {1: sae}):
            everywhere = tiny_bridge(tokens)
    p, q = (logits[:, :-1][predicted].log_softmax(-1) for logits in (original, replaced(y_hat)))
    error = (y_hat - y)[ordinary].square().sum(-1)
    expected = {
        "ce_original": ce(original),
        "ce_replaced": ce(replaced(y_hat)),
        "ce_replaced_all_positions": ce(everywhere),
        "ce_zero_ablation": ce(replaced(torch.zeros_like(y))),
        "kl": F.kl_div(q, p, log_target=True, reduction="batchmean").item(),
        "nmse": (error / y[ordinary].square().sum(-1)).mean().item(),
        "fvu": (error.sum() / (y[ordinary] - y[ordinary].mean(0)).square().sum()).item(),
        "heldout_tokens": len(error),
    }
    if name == "dense":
        assert [row[key] for key in (*OF_EXPERTS, *OF_GATE)] == [None] * 7
        assert density is None and row["k"] is None
    else:
        if name == "molt":
            sparse = y_hat[ordinary]
        else:
            sparse = acts @ sae.W_dec + (0 if "mxd" in name else sae.b_dec)
        hook = layer_of(sae).sparse_hook
        constant = sae.run_with_hooks(
            x, fwd_hooks=[(hook, lambda s, hook: sparse.mean(0).expand_as(s))]
        )
        cosines = torch.cosine_similarity(sparse, sparse.mean(0), dim=-1)
        torch.testing.assert_close(density, (acts > 0).float().mean(0))
        expected |= {
            "l0": (acts > 0).sum(-1).double().mean().item(),
            "alive_fraction": (acts > 0).any(0).double().mean().item(),
            "always_on": ((acts > 0).double().mean(0) > 0.5).sum().item(),
            "experts_cosine": cosines.mean().item(),
            "ce_mean_gate": ce(replaced(constant)),
        }
        shuffled = row["ce_shuffled_gate"], row["ce_shuffled_gate_matched"]
        assert len({expected["ce_replaced"], expected["ce_mean_gate"], *shuffled}) == 4
    found = {key: row[key] for key in expected}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["mxd", "dense"])
def test_progress_comes_to_its_end(tiny_bridge, heldout, capsys, name):
    sae, site = random_layer(name, d_sae=20), Site.at(tiny_bridge, 1)
    read = read_heldout(site, heldout, context_size=8, device="cpu", n_sequences=8, batch_size=4)
    for passes in (2, 0):  # by the MLP's first layer, its absence and its copy
        evaluate(tiny_bridge, sae, read)
        bar = capsys.readouterr().err.split("Measuring the model: ")[-1].split("|")
        n = 2 * (3 + 3 * (name == "mxd") + passes)
        assert bar[0] == "100%" and f" {n}/{n} " in bar[2]


def test_a_too_short_heldout_text(tiny_bridge):
    with pytest.raises(ValueError, match="held-out text is too short"):
        evaluate(tiny_bridge, random_layer("mxd"), Dataset.from_dict({"text": ["the cat"]}))
