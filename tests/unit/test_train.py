import json
import os
import signal

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mxd_lens import MxD, TopKSkipTranscoder, TopKTranscoder, evaluate, splice, train
from mxd_lens.analysis.faithfulness import _kl
from mxd_lens.data.activations import NonFiniteActivations, activations_store, pairs
from mxd_lens.models.site import mlp_hooks, special_tokens
from mxd_lens.runs.config import load_documents
from mxd_lens.runs.train import Interrupted


def weights(mxd):
    return {name: p.detach().clone() for name, p in mxd.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_pairs_are_the_mlps_input_and_output_without_special_tokens(tiny_bridge, documents):
    hooks = mlp_hooks(tiny_bridge, 1)
    store = activations_store(
        tiny_bridge,
        documents,
        hooks,
        context_size=8,
        batch_size=32,
        lm_batch_size=4,
        device="cpu",
        autocast_lm=False,
    )
    seen = []
    get = store.get_batch_tokens
    store.get_batch_tokens = lambda *a, **kw: seen.append(get(*a, **kw)) or seen[-1]
    batch = next(pairs(store, hooks))
    x, y = batch.split(16, dim=-1)
    torch.testing.assert_close(tiny_bridge.blocks[1].mlp.original_component(x), y)
    tokens = torch.cat(seen)
    _, cache = tiny_bridge.run_with_cache(tokens, names_filter=list(hooks))
    ordinary = ~torch.isin(tokens, special_tokens(tiny_bridge))
    allowed = cache[hooks[0]][ordinary]
    forbidden = cache[hooks[0]][~ordinary]
    exactly = "donot_use_mm_for_euclid_dist"
    assert torch.cdist(x, allowed, compute_mode=exactly).min(dim=1).values.max() < 1e-4
    assert torch.cdist(x, forbidden, compute_mode=exactly).min() > 1e-2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"recipe": "centred"}, MxD),
        ({"recipe": "paper"}, MxD),
        ({"architecture": "topk_transcoder"}, TopKTranscoder),
        ({"architecture": "topk_skip_transcoder"}, TopKSkipTranscoder),
        ({"architecture": "topk"}, TopKSAE),
        ({"architecture": "jumprelu", "sae_options": '{"l0_coefficient": 0.1}'}, JumpReLUSAE),
    ],
)
def test_training_saves_a_layer_plain_saelens_loads(
    tiny_bridge, documents, make_config, fields, expected
):
    cfg = make_config(**fields)
    layer = train(cfg, tiny_bridge, documents)
    loaded = SAE.load_from_disk(cfg.layer_path)
    assert type(loaded) is expected
    assert_same(weights(loaded), weights(layer))
    x = torch.randn(5, 16)
    torch.testing.assert_close(loaded(x), layer(x))
    metadata = loaded.cfg.metadata
    if isinstance(loaded, (TopKSAE, JumpReLUSAE)):
        assert metadata.hook_name == "blocks.1.mlp.hook_out"
    else:
        assert metadata.hook_name == "blocks.1.mlp.hook_in"
        assert metadata.hook_name_out == "blocks.1.mlp.hook_out"
    assert (metadata.model_name, metadata.context_size) == ("tiny", 8)
    assert metadata.training_tokens == 32 * 40
    assert (cfg.layer_path / "sparsity.safetensors").exists()
    assert not (cfg.layer_path.parent / "checkpoints").exists()


@pytest.mark.parametrize("architecture", ["mxd", "topk_transcoder", "topk_skip_transcoder", "topk"])
def test_training_lowers_the_error(tiny_bridge, documents, make_config, architecture):
    def nmse(tokens):
        cfg = make_config(
            architecture=architecture,
            training_tokens=tokens,
            output=make_config().output + str(tokens),
        )
        mxd = train(cfg, tiny_bridge, documents)
        held = load_documents(cfg, documents)[1]
        return evaluate(tiny_bridge, mxd, held, n_sequences=4, batch_size=4)[0]["nmse"]

    assert nmse(32 * 300) < 0.5 * nmse(32)


@pytest.mark.parametrize("recipe", ["centred", "paper"])
@pytest.mark.parametrize("stop", ["signal", "checkpoint"])
def test_an_interrupted_run_resumes_to_the_same_weights(
    tiny_bridge, documents, make_config, at_step, tmp_path, stop, recipe
):
    undisturbed = train(
        make_config(recipe=recipe, output=str(tmp_path / "whole")), tiny_bridge, documents
    )
    cfg = make_config(recipe=recipe, n_checkpoints=3 if stop == "checkpoint" else 0)

    def interrupt():
        if stop == "checkpoint":
            raise MemoryError
        os.kill(os.getpid(), signal.SIGINT)

    expected = Interrupted if stop == "signal" else MemoryError
    with at_step(17, interrupt), pytest.raises(expected):
        train(cfg, tiny_bridge, documents)
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == [str(32 * 18)] if stop == "signal" else left == [str(32 * 11)]
    torch.manual_seed(99)
    resumed = train(cfg, tiny_bridge, documents)
    assert_same(weights(resumed), weights(undisturbed))


def test_a_finished_run_is_loaded_and_another_one_is_not_overwritten(
    tiny_bridge, documents, make_config, at_step
):
    first = train(make_config(), tiny_bridge, documents)
    with at_step(0, lambda: pytest.fail("trained again")):
        again = train(make_config(), tiny_bridge, documents)
    assert_same(weights(first), weights(again))
    with pytest.raises(ValueError, match="k=3, seed=0, and this asks for k=2, seed=1"):
        train(make_config(k=2, seed=1), tiny_bridge, documents)


def test_a_truncated_checkpoint_is_named(tiny_bridge, documents, make_config, at_step):
    cfg = make_config()
    with (
        at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(Interrupted, match="resume"),
    ):
        train(cfg, tiny_bridge, documents)
    (state,) = cfg.layer_path.parent.glob("checkpoints/*/trainer_state.pt")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated or not of this run"):
        train(cfg, tiny_bridge, documents)


def test_non_finite_activations_stop_training_with_nothing_lost(
    tiny_bridge, documents, make_config, at_step
):
    cfg = make_config()
    down = tiny_bridge.blocks[1].mlp.original_component.down_proj

    def overflow():
        down.register_forward_hook(lambda module, args, out: out * float("inf"))

    with (
        at_step(5, overflow),
        pytest.raises(NonFiniteActivations, match=r"blocks\.1\.mlp\.hook_out"),
    ):
        train(cfg, tiny_bridge, documents)
    (saved,) = cfg.layer_path.parent.glob("checkpoints/*/sae_weights.safetensors")
    assert all(p.isfinite().all() for p in load_file(saved).values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 3}, "no layer 3: this model has layers 0 to 2"),
        ({"architecture": "topk_transcoder", "k": 13}, "k=13 units cannot be active"),
        ({"k": 13}, "k=13 experts cannot be active out of d_sae=12"),
        ({"k": 0}, "k=0"),
        ({"heldout_documents": 200}, "200 documents are too few"),
        ({"context_size": 100_000}, "too short"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    tiny_bridge, documents, make_config, fields, message
):
    with pytest.raises(ValueError, match=message):
        train(make_config(**fields), tiny_bridge, documents)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "relu"}, "unknown architecture 'relu'; known: .*mxd"),
        ({"sae_options": "{"}, "sae_options is not JSON"),
        ({"sae_options": '{"l1": 3}'}, "fields of TrainingMxDConfig: .*d_hidden"),
    ],
)
def test_a_layer_there_is_no_such_thing_as(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_fewer_tokens_than_a_batch(make_config):
    with pytest.raises(ValueError, match="less than one batch"):
        make_config(training_tokens=31)


def test_hooked_transformers_train_too(tiny_hooked, llama_folder, documents, make_config):
    tiny_hooked.set_tokenizer(AutoTokenizer.from_pretrained(llama_folder))
    mxd = train(make_config(), tiny_hooked, documents)
    assert mxd.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"


@pytest.fixture
def held_out(make_config, documents):
    return load_documents(make_config(), documents)[1]


@pytest.fixture
def with_metadata(tiny_bridge):
    def add(mxd):
        metadata = mxd.cfg.metadata
        metadata.hook_name, metadata.hook_name_out = mlp_hooks(tiny_bridge, 1)
        metadata.context_size = 8
        return mxd

    return add


def test_an_exact_copy_is_faithful_and_its_experts_mean_nothing(
    tiny_bridge, held_out, with_metadata
):
    mxd = with_metadata(MxD.from_mlp(tiny_bridge.blocks[1].mlp, d_sae=8, k=2))
    row, density = evaluate(tiny_bridge, mxd, held_out, n_sequences=8, batch_size=4)
    assert row["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert row["ce_replaced_all_positions"] == pytest.approx(row["ce_original"], abs=1e-5)
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert row["nmse"] == pytest.approx(0, abs=1e-8)
    for name in ("ce_mean_gate", "ce_shuffled_gate", "ce_shuffled_gate_matched"):
        assert row[name] == pytest.approx(row["ce_original"], abs=1e-5)
    assert (row["l0"], row["alive_fraction"], row["always_on"]) == (2, 0.25, 2)
    assert density.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    json.dumps(row)


def test_measurements_equal_those_of_the_spliced_model(
    tiny_bridge, held_out, with_metadata, random_mxd
):
    mxd = with_metadata(random_mxd(d_in=16, d_out=16, d_hidden=8, d_sae=10, k=3, dtype="float32"))
    row, _ = evaluate(tiny_bridge, mxd, held_out, n_sequences=4, n_tokens=20, batch_size=4)
    hooks = mlp_hooks(tiny_bridge, 1)
    tokens = activations_store(
        tiny_bridge,
        held_out,
        hooks,
        context_size=8,
        batch_size=32,
        lm_batch_size=4,
        device="cpu",
        autocast_lm=False,
    ).get_batch_tokens()
    predicted = ~torch.isin(tokens[:, 1:], special_tokens(tiny_bridge))

    def ce(logits):
        log_probs = logits[:, :-1].log_softmax(-1)
        return -log_probs.gather(-1, tokens[:, 1:, None])[..., 0][predicted].mean().item()

    original = tiny_bridge(tokens)
    assert row["ce_original"] == pytest.approx(ce(original), rel=1e-5)
    _, cache = tiny_bridge.run_with_cache(tokens, names_filter=list(hooks))
    x, y = (cache[hook] for hook in hooks)
    ordinary = ~torch.isin(tokens, special_tokens(tiny_bridge))
    assert row["nmse"] == pytest.approx(
        ((mxd(x) - y).square().sum(-1) / y.square().sum(-1))[ordinary].mean().item(), rel=1e-4
    )
    variance = (y[ordinary] - y[ordinary].mean(0)).square().sum()
    assert row["fvu"] == pytest.approx(
        ((mxd(x) - y)[ordinary].square().sum() / variance).item(), rel=1e-4
    )
    special = ~ordinary

    def pass_special_through(out, hook):
        return torch.where(special[..., None], y, out)

    original_mlp = tiny_bridge.blocks[1].mlp
    with splice(tiny_bridge, {1: mxd}):
        everywhere = tiny_bridge(tokens)
        replaced = tiny_bridge.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.mlp.hook_out", pass_special_through)]
        )
    assert tiny_bridge.blocks[1].mlp is original_mlp
    assert row["ce_replaced_all_positions"] == pytest.approx(ce(everywhere), rel=1e-5)
    assert row["ce_replaced"] == pytest.approx(ce(replaced), rel=1e-5)
    p, q = original.log_softmax(-1)[:, :-1][predicted], replaced.log_softmax(-1)[:, :-1][predicted]
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert row["kl"] == pytest.approx(kl, rel=1e-4)
    assert row["kl"] == pytest.approx(_kl(p, q) / len(p), rel=1e-4)


def test_a_too_short_heldout_text(tiny_bridge, with_metadata):
    mxd = with_metadata(MxD.from_mlp(tiny_bridge.blocks[1].mlp))
    with pytest.raises(ValueError, match="held-out text is too short"):
        evaluate(tiny_bridge, mxd, Dataset.from_dict({"text": ["the cat"]}))
