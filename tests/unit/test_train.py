"""Training: batches, what is saved, what resumes, what is refused."""

import os
import signal

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file

from mxd_lens import MxD, TopKSkipTranscoder, TopKTranscoder, evaluate, train
from mxd_lens.data.activations import NonFiniteActivations
from mxd_lens.data.stream import Part, Stream
from mxd_lens.layers.dense import Dense
from mxd_lens.layers.molt import MOLT
from mxd_lens.models.site import Site
from mxd_lens.startup import Interrupted, raise_on_signals

from ..helpers import HOOK_IN, HOOK_OUT, open_reader, same


def test_pairs_are_the_mlps_input_and_output_without_special_tokens(tiny_bridge, documents):
    site = Site.at(tiny_bridge, 1)
    reader = open_reader([site], documents)
    store = reader.store
    seen = []
    get = store.get_batch_tokens
    store.get_batch_tokens = lambda *a, **kw: seen.append(get(*a, **kw)) or seen[-1]
    x, y = next(Stream(reader, [Part(1, 0)]))[Part(1, 0)].split(16, dim=-1)
    torch.testing.assert_close(tiny_bridge.blocks[1].mlp.original_component(x), y)
    tokens = torch.cat(seen)
    _, cache = tiny_bridge.run_with_cache(tokens, names_filter=[HOOK_IN])
    special = torch.isin(tokens, site.special)
    exactly = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(x, cache[HOOK_IN].flatten(0, 1), compute_mode=exactly)
    allowed, forbidden = distances[:, ~special.flatten()], distances[:, special.flatten()]
    assert allowed.min(dim=1).values.max() < 1e-4 and forbidden.min() > 1e-2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, MxD),
        ({"architecture": "mxd_paper"}, MxD),
        ({"architecture": "dense", "d_sae": 32}, Dense),
        ({"architecture": "molt", "sae_options": '{"rank": 2}'}, MOLT),
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
    same(loaded.state_dict(), layer.state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(loaded(x), layer(x))
    metadata = loaded.cfg.metadata
    output_only = isinstance(loaded, TopKSAE | JumpReLUSAE)
    hooks = (HOOK_OUT, None) if output_only else (HOOK_IN, HOOK_OUT)
    assert (metadata.hook_name, metadata.hook_name_out) == hooks
    assert (metadata.model_name, metadata.context_size) == ("tiny", 8)
    assert metadata.training_tokens == 32 * 40
    assert (cfg.layer_path / "sparsity.safetensors").exists()
    assert not (cfg.layer_path.parent / "checkpoints").exists()


LEARNED = ["mxd", "molt", "topk_transcoder", "topk_skip_transcoder", "topk", "dense"]


@pytest.mark.parametrize("architecture", LEARNED)
def test_training_lowers_the_error(tiny_bridge, documents, make_config, tmp_path, architecture):
    def nmse(tokens):
        run = {"training_tokens": tokens, "output": f"{tmp_path}/{tokens}"}
        cfg = make_config(architecture=architecture, **run)
        layer = train(cfg, tiny_bridge, documents)
        held = cfg.documents(documents)[1]
        return evaluate(tiny_bridge, layer, held, n_sequences=4, batch_size=4)[0]["nmse"]

    assert nmse(32 * 300) < 0.5 * nmse(32)


@pytest.mark.parametrize("architecture", ["mxd", "mxd_paper"])
@pytest.mark.parametrize(
    ("signals", "expected", "saved"),
    [
        ([signal.SIGINT], Interrupted, 18),  # steps that are in the checkpoint
        ([signal.SIGTERM, signal.SIGTERM], Interrupted, 11),  # half a step is not saved
        ([], MemoryError, 11),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_weights(
    tiny_bridge, documents, make_config, at_step, tmp_path, architecture, signals, expected, saved
):
    cfg, whole = (
        make_config(architecture=architecture, output=tmp_path / name) for name in ("run", "whole")
    )
    undisturbed = train(whole, tiny_bridge, documents)

    def interrupt():
        for number in signals:
            os.kill(os.getpid(), number)
        if not signals:
            raise MemoryError

    with raise_on_signals(), at_step(17, interrupt), pytest.raises(expected) as caught:
        train(cfg, tiny_bridge, documents)
    assert getattr(caught.value, "number", None) in (signals or [None])
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == [str(32 * saved)]
    torch.manual_seed(99)
    resumed = train(cfg, tiny_bridge, documents)
    same(resumed.state_dict(), undisturbed.state_dict())


def test_a_finished_run_is_loaded_and_another_one_is_not_overwritten(
    tiny_bridge, documents, make_config, at_step, edit_json, tmp_path
):
    first = train(make_config(), tiny_bridge, documents)
    edit_json(tmp_path / "run" / "runner_cfg.json", device="cuda:7")  # where does not matter
    with at_step(0, lambda: pytest.fail("trained again")):
        again = train(make_config(), tiny_bridge, documents)
    same(first.state_dict(), again.state_dict())
    with pytest.raises(ValueError, match="k=3, seed=0, and this asks for k=2, seed=1"):
        train(make_config(k=2, seed=1), tiny_bridge, documents)


def test_a_truncated_checkpoint_is_named(tiny_bridge, documents, stopped):
    cfg = stopped()
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
        ({"heldout_documents": 200}, "200 documents are too few"),
        ({"context_size": 100_000}, "too short"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    tiny_bridge, documents, make_config, fields, message
):
    with pytest.raises(ValueError, match=message):
        train(make_config(**fields), tiny_bridge, documents)
