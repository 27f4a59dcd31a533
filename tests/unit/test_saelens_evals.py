"""SAELens' evaluation of layers between two hooks, against the same numbers computed plainly."""

from __future__ import annotations

import pytest
import torch
from sae_lens import evals
from sae_lens.evals import EvalConfig, get_eval_everything_config
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from mxd_lens.analysis.saelens_evals import at_output, run_evals
from mxd_lens.data.activations import activations_store
from mxd_lens.models.site import Site

from ..helpers import HOOK_IN, STORE, random_layer

N_BATCHES = 3
LAYERS = ["mxd", "jumprelu_mxd", "dense"]
LAYERS += ["topk_transcoder", "topk_skip_transcoder", "transcoder", "skip_transcoder"]
RECONSTRUCTION = EvalConfig(
    n_eval_reconstruction_batches=N_BATCHES, compute_kl=True, compute_ce_loss=True
)
THE_LAYER_ALONE = EvalConfig(
    n_eval_sparsity_variance_batches=N_BATCHES,
    compute_l2_norms=True,
    compute_sparsity_metrics=True,
    compute_variance_metrics=True,
    compute_featurewise_density_statistics=True,
)


@pytest.fixture
def store(lm, documents):
    """``store()``: the same text from its start."""
    return lambda: activations_store([Site.at(lm, 1)], documents, **STORE)


@pytest.fixture
def mxd(lm) -> SAE:
    return random_layer("mxd", lm)


@torch.no_grad()
def plainly(lm, layer: SAE, store) -> dict[str, float]:
    """What run_evals says, from logits and activations at non-special tokens."""
    hook_out = layer.cfg.metadata.hook_name_out
    log_probs: dict[str, list[Tensor]] = {"without": [], "with": [], "ablation": []}
    targets, predicting, ordinary, xs, ys = [], [], [], [], []
    for _ in range(N_BATCHES):
        tokens = store.get_batch_tokens()
        keep = tokens > 2
        _, cache = lm.run_with_cache(tokens)
        x, y = cache[HOOK_IN], cache[hook_out]
        for name, replacement in {
            "without": y,
            "with": torch.where(keep[..., None], layer(x), y),
            "ablation": torch.zeros_like(y),
        }.items():
            logits = lm.run_with_hooks(
                tokens, fwd_hooks=[(hook_out, lambda *_, hook, new=replacement: new)]
            )
            log_probs[name].append(logits.double().log_softmax(-1))
        targets.append(tokens[:, 1:][keep[:, :-1]])
        predicting.append(keep[:, :-1])
        ordinary.append(keep)
        xs.append(x[keep])
        ys.append(y[keep])
    predicting, ordinary = torch.cat(predicting), torch.cat(ordinary)
    assert 0 < ordinary.sum() < ordinary.numel()
    lp = {name: torch.cat(batches) for name, batches in log_probs.items()}
    ce = {
        name: -v[:, :-1][predicting].gather(-1, torch.cat(targets)[:, None]).mean().item()
        for name, v in lp.items()
    }
    p = lp["without"][ordinary]
    kl = {name: (p.exp() * (p - v[ordinary])).sum(-1).mean().item() for name, v in lp.items()}

    x, y = torch.cat(xs), torch.cat(ys).double()
    y_hat, acts = layer(x).double(), layer.encode(x)
    error = (y - y_hat).square().sum(-1)
    return {
        "ce_loss_without_sae": ce["without"],
        "ce_loss_with_sae": ce["with"],
        "ce_loss_with_ablation": ce["ablation"],
        "ce_loss_score": (ce["ablation"] - ce["with"]) / (ce["ablation"] - ce["without"]),
        "kl_div_with_sae": kl["with"],
        "kl_div_with_ablation": kl["ablation"],
        "kl_div_score": 1 - kl["with"] / kl["ablation"],
        "mse": error.mean().item(),
        "explained_variance": 1 - (error.sum() / (y - y.mean(0)).square().sum()).item(),
        "cossim": torch.cosine_similarity(y, y_hat).mean().item(),
        "l2_norm_in": y.norm(dim=-1).mean().item(),
        "l2_norm_out": y_hat.norm(dim=-1).mean().item(),
        "l2_ratio": (y_hat.norm(dim=-1) / y.norm(dim=-1)).mean().item(),
        "l0": (acts != 0).double().sum(-1).mean().item(),
        "l1": acts.double().abs().sum(-1).mean().item(),
        "feature_density": (acts != 0).double().mean(0).tolist(),
    }


def measured(lm, layer: SAE, store, run=run_evals) -> dict[str, float]:
    found = {}
    for cfg in (RECONSTRUCTION, THE_LAYER_ALONE):
        metrics, features = run(layer, store(), lm, ActivationScaler(), cfg)
        for group in (*metrics.values(), features):
            found |= group
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_plain_computation(lm, store, name):
    layer = random_layer(name, lm, 0.3)
    expected, found = plainly(lm, layer, store()), measured(lm, layer, store)
    assert abs(expected["ce_loss_with_sae"] - expected["ce_loss_without_sae"]) > 0.01
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_everything_saelens_can_measure(lm, mxd, store):
    cfg = get_eval_everything_config(4, N_BATCHES, N_BATCHES)
    metrics, features = run_evals(mxd, store(), lm, ActivationScaler(), cfg, verbose=True)
    assert len(metrics) == 6
    assert all(len(values) == 40 for values in features.values())
    assert features["encoder_bias"] == mxd.b_enc.tolist()


def test_all_tokens(lm, mxd, store):
    metrics, _ = run_evals(
        mxd, store(), lm, ActivationScaler(), THE_LAYER_ALONE, exclude_special_tokens=False
    )
    batches = store()
    tokens = torch.cat([batches.get_batch_tokens() for _ in range(N_BATCHES)])
    _, cache = lm.run_with_cache(tokens)
    y, y_hat = cache[mxd.cfg.metadata.hook_name_out], mxd(cache[HOOK_IN])
    expected = (y - y_hat).square().sum(-1).mean().item()
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx(expected, rel=1e-4)


def test_an_sae_passes_through(lm, store):
    sae = random_layer("topk", lm)
    sae.cfg.metadata.hook_name_out = None
    with at_output(lm, sae) as same:
        assert same is sae
    found, expected = measured(lm, sae, store), measured(lm, sae, store, evals.run_evals)
    assert found["l0"] == 4
    assert repr(found) == repr(expected)  # nan included


def test_a_bridges_other_names_of_a_hook(tiny_bridge):
    mxd = random_layer("mxd")
    mxd.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with at_output(tiny_bridge, mxd) as layer:
        assert layer.cfg.metadata.hook_name == "blocks.1.mlp.hook_out"
    assert mxd.cfg.metadata.hook_name == HOOK_IN


def test_leaves_no_hook_behind(lm, mxd, tokens):
    def hooks() -> int:
        points = [*lm.hook_dict.values(), *mxd.hook_dict.values()]
        return sum(len(point._forward_hooks) for point in points)

    seen = []
    lm.hook_dict[mxd.cfg.metadata.hook_name].add_perma_hook(lambda x, hook: seen.append(x))
    before = hooks()
    with pytest.raises(KeyError), at_output(lm, mxd):
        assert hooks() == before + 2
        raise KeyError
    assert hooks() == before
    lm(tokens)
    assert len(seen) == 1


def test_reads_the_input_of_the_same_forward_pass_only(lm, mxd, tokens):
    with at_output(lm, mxd) as layer:
        with pytest.raises(RuntimeError, match="after no input"):
            layer.encode(torch.zeros(2, 7, 16))
        _, cache = lm.run_with_cache(tokens)
        y = cache[mxd.cfg.metadata.hook_name_out]
        acts = layer.encode(y)
        torch.testing.assert_close(layer.decode(acts), mxd(cache[HOOK_IN]))
        with pytest.raises(RuntimeError, match="after no input"):
            layer.encode(y)
        with pytest.raises(RuntimeError, match="what the last encode gave"):
            layer.decode(acts + 1)
        lm(tokens)
        with pytest.raises(RuntimeError, match=r"\(2, 3, 16\) after an input \(2, 7, 16\)"):
            layer.encode(y[:, :3])


def test_what_cannot_be_evaluated(lm, mxd, store):
    with pytest.raises(ValueError, match="cannot rescale"):
        run_evals(mxd, store(), lm, ActivationScaler(scaling_factor=2.0), RECONSTRUCTION)
    mxd.cfg.metadata.hook_name_out = "blocks.9.hook_mlp_out"
    with pytest.raises(ValueError, match=r"no hook blocks\.9\.hook_mlp_out"):
        run_evals(mxd, store(), lm, ActivationScaler(), RECONSTRUCTION)
