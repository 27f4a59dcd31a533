"""Editing single coefficients in a running model, against plain hooks and by hand."""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from transformers import AutoTokenizer

from mxd_lens.analysis import judge
from mxd_lens.analysis.embedding import coherence
from mxd_lens.analysis.judge import Judge
from mxd_lens.analysis.steering import (
    contributions,
    effect_amounts,
    evaluate_steering,
    generate_steered,
    steer,
)
from mxd_lens.layers.mxd import MxD, MxDConfig
from mxd_lens.layers.transcoder import (
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)
from mxd_lens.models.splice import splice
from tests.conftest import N_VOCAB, randomise

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
pytestmark = pytest.mark.usefixtures("one_thread")

HOOK_OUT = {"tiny_hooked": "blocks.1.hook_mlp_out", "tiny_bridge": "blocks.1.mlp.hook_out"}
LAYERS = {
    "mxd": (MxD, MxDConfig, {"d_out": 16, "d_hidden": 32}),
    "topk_transcoder": (TopKTranscoder, TopKTranscoderConfig, {"d_out": 16}),
    "topk_skip_transcoder": (TopKSkipTranscoder, TopKSkipTranscoderConfig, {"d_out": 16}),
    "topk": (TopKSAE, TopKSAEConfig, {}),
}
ACTS = "blocks.1.mlp.hook_sae_acts_post"
EXPERTS = [5, 17, 30]


@pytest.fixture(params=HOOK_OUT)
def model(request) -> str:
    return request.param


@pytest.fixture
def lm(request, model):
    return request.getfixturevalue(model)


def make_layer(name: str, model: str) -> SAE:
    cls, cfg, fields = LAYERS[name]
    hook_in = HOOK_OUT[model] if name == "topk" else "blocks.1.mlp.hook_in"
    metadata = SAEMetadata(hook_name=hook_in, hook_name_out=HOOK_OUT[model])
    layer = cls(cfg(d_in=16, d_sae=40, k=4, metadata=metadata, **fields))
    randomise(layer, 0.5)
    return layer


@pytest.fixture(params=LAYERS)
def layer(request, model) -> SAE:
    return make_layer(request.param, model)


@pytest.fixture
def mxd(model) -> SAE:
    return make_layer("mxd", model)


@contextmanager
def assigned(lm, layer):
    mlp = lm.blocks[1].mlp
    lm.blocks[1].mlp = layer
    yield
    lm.blocks[1].mlp = mlp


IN_PLACE = {
    "spliced": lambda lm, layer: splice(lm, {1: layer}),
    "assigned": assigned,
    "attached": lambda lm, layer: lm.saes([layer]),
    "attached, with error term": lambda lm, layer: lm.saes([layer], use_error_term=True),
}


@pytest.fixture(params=IN_PLACE)
def in_place(request):
    """``in_place(model, layer)``: a context in which the layer is in place."""
    return IN_PLACE[request.param]


def edited(lm, layer, tokens, edit, hook_name=ACTS):
    """Logits with ``edit(acts)``, in place, on the coefficients: by a plain hook."""

    def hook(acts, hook):
        acts = acts.clone()
        edit(acts)
        return acts

    if hook_name not in lm.hook_dict:  # assigned without the model's noticing
        layer.hook_sae_acts_post.add_hook(hook)
        logits = lm(tokens)
        layer.hook_sae_acts_post.remove_hooks()
        return logits
    return lm.run_with_hooks(tokens, fwd_hooks=[(hook_name, hook)])


def add(acts, by, where=slice(None)):
    for i, expert in enumerate(EXPERTS):
        acts[:, where, expert] += by[i]


AMOUNTS = torch.tensor([0.7, -1.3, 2.0])


def test_add_is_a_hook_on_the_coefficients(lm, layer, in_place, tokens):
    if in_place is IN_PLACE["spliced"] and not hasattr(layer.cfg, "d_out"):
        in_place = assigned  # splice refuses an SAE of the output
    with in_place(lm, layer):
        plain = lm(tokens)
        expected = edited(lm, layer, tokens, lambda acts: add(acts, AMOUNTS))
        assert (expected - plain).abs().max() > 0.05
        with steer(lm, layer, EXPERTS, add=AMOUNTS):
            close(lm(tokens), expected)
        assert torch.equal(lm(tokens), plain)


def scaled(acts, by):
    for i, expert in enumerate(EXPERTS):
        acts[..., expert] *= by[i]


def clamped(acts, by):
    for i, expert in enumerate(EXPERTS):
        acts[..., expert] = by[i]


def test_the_other_edits(lm, mxd, tokens):
    experts = list(range(40))  # so that some are active
    by = torch.randn(40)

    with splice(lm, {1: mxd}):
        plain = lm(tokens)
        for name, amount, edit in [
            ("scale", by, lambda acts: acts.mul_(by)),
            ("clamp", by, lambda acts: acts.copy_(by.expand_as(acts))),
            ("clamp", 0.3, lambda acts: acts.fill_(0.3)),
            ("ablate", True, lambda acts: acts.zero_()),
        ]:
            expected = edited(lm, mxd, tokens, edit)
            assert (expected - plain).abs().max() > 0.05
            with steer(lm, mxd, experts, **{name: amount}):
                close(lm(tokens), expected)


@pytest.mark.parametrize("positions", [[2], [0, 4, -1], [-2, 99], []])
def test_only_at_some_positions(lm, mxd, tokens, positions):
    where = [p for p in positions if p < 7]
    with splice(lm, {1: mxd}):
        expected = edited(lm, mxd, tokens, lambda acts: add(acts, AMOUNTS, where))
        with steer(lm, mxd, EXPERTS, add=AMOUNTS, positions=positions):
            close(lm(tokens), expected)


class TestErrorTerm:
    """The output is the original's and exactly the effect of the edit."""

    def test_without_effect_it_is_the_original(self, lm, layer, tokens):
        original = lm(tokens)
        with lm.saes([layer], use_error_term=True), steer(lm, layer, EXPERTS, add=0.0):
            close(lm(tokens), original)

    def test_the_effect_is_added_to_the_mlps_output(self, lm, layer, tokens):
        metadata = layer.cfg.metadata
        _, cache = lm.run_with_cache(tokens)
        x = cache[metadata.hook_name]
        acts = layer.encode(x)
        clean = layer.decode(acts)
        more = layer.encode(x)
        add(more, AMOUNTS, [1, 3])
        effect = layer.decode(more) - clean
        original = lm(tokens)
        expected = lm.run_with_hooks(
            tokens, fwd_hooks=[(metadata.hook_name_out, lambda y, hook: y + effect)]
        )
        assert (expected - original).abs().max() > 0.05
        with (
            lm.saes([layer], use_error_term=True),
            steer(lm, layer, EXPERTS, add=AMOUNTS, positions=[1, 3]),
        ):
            close(lm(tokens), expected)


def test_caches_show_the_edited_coefficients(lm, mxd, tokens):
    with splice(lm, {1: mxd}):
        plain = lm.run_with_cache(tokens)[1][ACTS]
        with steer(lm, mxd, EXPERTS, add=AMOUNTS):
            found = lm.run_with_cache(tokens)[1][ACTS]
    expected = plain.clone()
    add(expected, AMOUNTS)
    close(found, expected)


def test_nested_blocks_edit_one_after_the_other(lm, mxd, tokens):
    def both(acts):
        add(acts, AMOUNTS)
        scaled(acts, [0.5] * 3)

    with splice(lm, {1: mxd}):
        expected = edited(lm, mxd, tokens, both)
        with steer(lm, mxd, EXPERTS, add=AMOUNTS), steer(lm, mxd, EXPERTS, scale=0.5):
            close(lm(tokens), expected)
        with steer(lm, mxd, EXPERTS, scale=0.5), steer(lm, mxd, EXPERTS, add=AMOUNTS):
            assert (lm(tokens) - expected).abs().max() > 0.05
            lm.reset_hooks()
            assert (lm(tokens) - expected).abs().max() > 0.05


def test_what_is_written_can_be_the_same_everywhere(lm, layer, tokens):
    """Added to the layer's output, at all or chosen tokens, each row of the batch its own."""
    write = torch.randn(len(EXPERTS), 16)
    amounts = torch.randn(len(tokens), len(EXPERTS))
    name = layer.cfg.metadata.hook_name_out
    expected = {}
    for positions in (None, (1, 3)):
        at = torch.zeros(tokens.shape[1], 1)
        at[slice(None) if positions is None else list(positions)] = 1
        expected[positions] = lm.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda y, hook, at=at: y + (amounts @ write)[:, None] * at)]
        )
    for positions, logits in expected.items():
        with (
            lm.saes([layer], use_error_term=True),
            steer(lm, layer, EXPERTS, add=amounts, write=write, positions=positions),
        ):
            close(lm(tokens), logits)
    with lm.saes([layer]), steer(lm, layer, EXPERTS, add=2.0, write=write):
        single = lm(tokens)
    with lm.saes([layer]), steer(lm, layer, EXPERTS, add=torch.full((3,), 2.0), write=write):
        close(lm(tokens), single)


def test_rows_of_a_batch_have_their_own_amounts(lm, layer, tokens):
    amounts = torch.tensor([[1.5, 0.0, 0.0], [0.0, -2.0, 0.3]])
    with lm.saes([layer], use_error_term=True):
        expected = []
        for row, by in zip(tokens, amounts, strict=True):
            with steer(lm, layer, EXPERTS, add=by, positions=[2, -1]):
                expected.append(lm(row[None]))
        with steer(lm, layer, EXPERTS, add=amounts, positions=[2, -1]):
            close(lm(tokens), torch.cat(expected))


@pytest.mark.parametrize("positions", [None, [3], [4, 6]])
def test_generation_with_a_cache_is_generation_without(lm, mxd, in_place, tokens, positions):
    def generate(use_past_kv_cache):
        return lm.generate(
            tokens[:, :4],
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_past_kv_cache,
            verbose=False,
            return_type="tokens",
        )

    with in_place(lm, mxd):
        plain = generate(True)
        with steer(lm, mxd, EXPERTS, clamp=100.0, positions=positions):
            found = generate(True)
            # In one pass over what was generated, each token is the best after those before.
            best = lm(found.clone())[:, 3:-1].argmax(-1)
            assert generate(False).tolist() == found.tolist()
        assert found[:, 4:].tolist() == best.tolist()
        assert found.tolist() != plain.tolist()
        assert generate(True).tolist() == plain.tolist()


def test_negative_positions_are_those_of_each_pass(lm, mxd, tokens):
    seen = []
    with splice(lm, {1: mxd}), steer(lm, mxd, [5], clamp=100.0, positions=[-1]), ExitStack() as end:
        hook = mxd.hook_sae_acts_post.register_forward_hook(
            lambda hook, args, acts: seen.append((acts[0, :, 5] == 100).tolist())
        )
        end.callback(hook.remove)
        lm.generate(tokens[:1, :4], max_new_tokens=3, stop_at_eos=False, verbose=False)
    assert seen == [[False, False, False, True], [True], [True]]


def test_the_sparse_path_is_left_only_while_steering(lm, mxd, tokens):
    with splice(lm, {1: mxd}):
        with pytest.raises(ZeroDivisionError), steer(lm, mxd, [5], ablate=True, positions=[0]):
            assert mxd.hook_sae_acts_post._forward_hooks
            raise ZeroDivisionError
        assert not mxd.hook_sae_acts_post._forward_hooks
        assert not lm.blocks[1]._forward_pre_hooks


def test_gradients_reach_the_amounts(lm, mxd, tokens):
    amounts = torch.zeros(3, requires_grad=True)
    with splice(lm, {1: mxd}), steer(lm, mxd, EXPERTS, add=amounts):
        lm(tokens)[0, -1, 3].backward()
    assert amounts.grad is not None and (amounts.grad != 0).all()


class TestErrors:
    def check(self, lm, mxd, match, *experts, **edit):
        with (
            splice(lm, {1: mxd}),
            pytest.raises(ValueError, match=match),
            steer(lm, mxd, experts or [1], **edit),
        ):
            pass

    def test_edits(self, lm, mxd):
        self.check(lm, mxd, "say one of add, scale, clamp and ablate, got none")
        self.check(lm, mxd, "got add and ablate", add=1.0, ablate=True)

    def test_what_is_written(self, lm, mxd):
        rows = "one row for each of the 2 experts, and goes with add: got "
        self.check(lm, mxd, rows + "2 rows, with scale", 1, 2, scale=2.0, write=torch.ones(2, 16))
        self.check(lm, mxd, rows + "3 rows, with add", 1, 2, add=2.0, write=torch.ones(3, 16))

    def test_experts(self, lm, mxd):
        self.check(lm, mxd, "no expert 40: this layer has experts 0 to 39", 3, 40, add=1.0)
        self.check(lm, mxd, "no expert -1", -1, add=1.0)
        self.check(lm, mxd, r"the same expert twice in \[3, 3\]", 3, 3, add=1.0)

    def test_amounts(self, lm, mxd, tokens):
        self.check(lm, mxd, r"add has shape \(3,\): for 2 experts", 1, 2, add=torch.ones(3))
        with (
            splice(lm, {1: mxd}),
            steer(lm, mxd, [1], add=torch.ones(3, 1)),
            pytest.raises(ValueError, match=r"add has 3 rows, the batch .* reads 2"),
        ):
            lm(tokens)

    def test_a_layer_that_is_not_in_place(self, lm, mxd):
        with (
            pytest.raises(ValueError, match=r"not in place .*splice\(.*add_sae\("),
            steer(lm, mxd, [1], add=1.0),
        ):
            pass


# What steering makes of the text

PROMPT = "the cat sat"


@pytest.fixture
def writer(lm, llama_folder):
    """The model, with a tokenizer, and without the tokens that one does not know."""
    if lm.tokenizer is None:
        lm.set_tokenizer(AutoTokenizer.from_pretrained(llama_folder))
    unknown = torch.arange(len(lm.tokenizer), N_VOCAB)
    lm.unembed.register_forward_hook(lambda _, args, y: y.index_fill(-1, unknown, -torch.inf))
    return lm


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_amounts_have_the_effect_asked_for(name):
    layer = make_layer(name, "tiny_bridge")
    if name == "topk":
        layer.cfg.rescale_acts_by_decoder_norm = True
    x, y_norm = torch.randn(50, 16), 3.0
    experts = [0, 7, 39]
    amounts = effect_amounts(layer, experts, 0.5, x, y_norm)
    for expert, amount in zip(experts, amounts, strict=True):

        def add_amount(acts, hook, expert=expert, amount=amount):
            return acts + amount * torch.eye(40)[expert]

        found = layer.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", add_amount)])
        close((found - layer(x)).norm(dim=-1).mean(), torch.tensor(0.5 * y_norm))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_contributions_are_written_where_the_expert_fires(name):
    layer = make_layer(name, "tiny_bridge")
    if name == "topk":
        layer.cfg.rescale_acts_by_decoder_norm = True
    x, experts = torch.randn(200, 16), [0, 7, 39]
    found = contributions(layer, experts, x)
    for expert, row in zip(experts, found, strict=True):
        plain = layer.W_dec[expert]
        if name == "topk":
            plain = plain / plain.norm()
        if name.startswith("mxd"):
            most = (x @ layer.W_enc[:, expert] + layer.b_enc[expert]).sort(descending=True)[1][:32]
            plain = torch.stack([layer.hidden(x[i]) @ layer.expert_weights(expert) for i in most])
            plain = plain.mean(0)
        close(row, plain)
    amounts = effect_amounts(layer, experts, 0.5, x, 3.0, write=found)
    close((amounts[:, None] * found).norm(dim=-1), torch.full((3,), 1.5))


def test_an_expert_without_effect_is_an_error():
    layer = make_layer("topk_transcoder", "tiny_bridge")
    layer.W_dec.data[7] = 0
    with pytest.raises(ValueError, match="expert 7 has no effect"):
        effect_amounts(layer, [3, 7], 1.0, torch.randn(5, 16), 1.0)


@torch.no_grad()
def greedily(lm, n_tokens: int) -> str:
    """The best tokens but BOS and EOS, one by one."""
    tokens = lm.to_tokens(PROMPT)
    n_prompt = tokens.shape[1]
    for _ in range(n_tokens):
        logits = lm(tokens)[:, -1]
        logits[:, [lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id]] = -torch.inf
        best = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=-1)
    before = lm.tokenizer.decode(tokens[0, :n_prompt])
    return lm.tokenizer.decode(tokens[0]).removeprefix(before)


def test_each_expert_steers_its_own_samples(writer, layer):
    expected = []
    amounts = torch.tensor([5.0, -100.0, 300.0])
    start = int(writer.to_tokens(PROMPT)[0, 0] < 3)  # a BOS token is left alone
    for expert, amount in zip(EXPERTS, amounts, strict=True):
        with (
            writer.saes([layer], use_error_term=True),
            steer(writer, layer, [expert], add=amount, positions=range(start, 20)),
        ):
            expected.append(greedily(writer, 6))
    assert len(set(expected)) > 1
    found = generate_steered(
        writer,
        layer,
        EXPERTS,
        amounts,
        prompt=PROMPT,
        n_samples=2,
        n_tokens=6,
        temperature=0.0,
        batch_size=4,
    )
    assert found == [[text] * 2 for text in expected]
    unsteered = generate_steered(
        writer, layer, [5], torch.zeros(1), prompt=PROMPT, n_tokens=6, temperature=0.0
    )
    assert unsteered == [[greedily(writer, 6)]]


def test_samples_of_what_is_written(writer, layer):
    write = torch.randn(len(EXPERTS), 16)
    amounts = torch.tensor([3.0, -30.0, 9.0])
    name = layer.cfg.metadata.hook_name_out
    start = int(writer.to_tokens(PROMPT)[0, 0] < 3)
    expected = []
    for vector in amounts[:, None] * write:

        def add(y, hook, vector=vector):
            return torch.cat([y[:, :start], y[:, start:] + vector], dim=1)

        with writer.hooks(fwd_hooks=[(name, add)]):
            expected.append(greedily(writer, 6))
    assert len(set(expected)) > 1
    options = {"prompt": PROMPT, "n_tokens": 6, "temperature": 0.0, "batch_size": 2}
    found = generate_steered(writer, layer, EXPERTS, amounts, write=write, **options)
    assert found == [[text] for text in expected]


def test_samples_are_the_seeds(writer, mxd):
    def generate(seed):
        amounts = torch.ones(3)
        return generate_steered(
            writer, mxd, EXPERTS, amounts, prompt=PROMPT, n_samples=4, n_tokens=12, seed=seed
        )

    state = torch.get_rng_state()
    samples = generate(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(itertools.chain(*samples))) == 12
    assert generate(1) == samples
    assert generate(2) != samples
    special = (writer.tokenizer.bos_token, writer.tokenizer.eos_token)
    assert not any(token in text for token in special for text in itertools.chain(*samples))


def test_more_tokens_than_the_model_reads(writer, mxd):
    with pytest.raises(ValueError, match=r"n_tokens=40 after .* model reads 32"):
        generate_steered(writer, mxd, [5], torch.ones(1), prompt=PROMPT, n_tokens=40)


def test_generating_restores_the_model(writer, layer, tokens, monkeypatch):
    name = layer.cfg.metadata.hook_name_out
    before, logits = dict(writer.hook_dict), writer(tokens)
    zeros = [(name, lambda y, hook: 0 * y)]
    zeroed = writer.run_with_hooks(tokens, fwd_hooks=zeros)

    def check():
        after = writer.hook_dict
        assert after.keys() == before.keys()
        assert all(after[key] is hook for key, hook in before.items())
        assert torch.equal(writer(tokens), logits)
        close(writer.run_with_hooks(tokens, fwd_hooks=zeros), zeroed)
        assert not layer.hook_sae_acts_post._forward_hooks
        assert layer.hook_sae_acts_post.name == "hook_sae_acts_post"

    generate_steered(writer, layer, [5], torch.ones(1), prompt=PROMPT, n_tokens=2)
    check()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "generate", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate_steered(writer, layer, [5], torch.ones(1), prompt=PROMPT, n_tokens=2)
    check()


def test_perplexity_is_that_of_what_follows_the_prompt(writer, monkeypatch):
    monkeypatch.setattr(judge, "embed", lambda texts, device: torch.eye(3)[: len(texts)])
    samples = ["on the mat", "a dog", "fish fish fish saw"]
    nats = []
    for sample in samples:
        tokens = writer.to_tokens(f"{PROMPT} {sample}")
        losses = -writer(tokens)[0, :-1].log_softmax(-1)[
            torch.arange(tokens.shape[1] - 1), tokens[0, 1:]
        ]
        nats += losses[-len(sample.split()) :].tolist()
    assert len(nats) == 9
    scores = Judge(writer, PROMPT)([f" {sample}" for sample in samples])
    close(scores["perplexity"], torch.tensor(nats).mean().exp().item())
    assert scores["coherence"] == 0


def n_words(samples: list[str]) -> dict[str, float]:
    return {"coherence": len(set(samples)) / len(samples), "perplexity": 1.0}


class TestEvaluation:
    @pytest.fixture
    def evaluate(self, writer, mxd):
        def evaluate(strengths, experts=(5, 17), **options):
            options = {"n_samples": 3, "n_tokens": 4, "judge": n_words, **options}
            x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
            return evaluate_steering(
                writer, mxd, experts, strengths, x, 2.0, prompt=PROMPT, **options
            )

        return evaluate

    @pytest.mark.parametrize("model", ["tiny_bridge"], indirect=True)
    def test_rows(self, evaluate, writer, mxd):
        saved = []
        result = evaluate([0.5, 2.0], name="ours", save=lambda r: saved.append(json.dumps(r)))
        assert {key: result[key] for key in list(result)[:6]} == {
            "edit": "coefficient",
            "prompt": PROMPT,
            "n_samples": 3,
            "n_tokens": 4,
            "temperature": 1.0,
            "seed": 0,
        }
        assert result["unsteered"].keys() == {"coherence", "perplexity"}
        rows = result["rows"]
        assert [(r["name"], r["expert"], r["strength"]) for r in rows] == [
            ("ours", 5, 0.5), ("ours", 17, 0.5), ("ours", 5, 2.0), ("ours", 17, 2.0)
        ]  # fmt: skip
        close(rows[2]["amount"], 4 * rows[0]["amount"])
        assert [len(json.loads(text)["rows"]) for text in saved] == [2, 4]
        assert json.loads(saved[-1]) == result
        amounts = torch.tensor([rows[0]["amount"], rows[1]["amount"]])
        samples = generate_steered(
            writer, mxd, [5, 17], amounts, prompt=PROMPT, n_samples=3, n_tokens=4
        )
        assert [row["samples"] for row in rows[:2]] == samples
        assert rows[0]["coherence"] == n_words(samples[0])["coherence"]
        write = torch.randn(2, 16)
        written = evaluate([2.0], write=write)
        assert written["edit"] == "contribution"
        amounts = torch.tensor([row["amount"] for row in written["rows"]])
        close((amounts[:, None] * write).norm(dim=-1), torch.full((2,), 4.0))
        samples = generate_steered(
            writer, mxd, [5, 17], amounts, write=write, prompt=PROMPT, n_samples=3, n_tokens=4
        )
        assert [row["samples"] for row in written["rows"]] == samples
        with pytest.raises(ValueError, match="were made with other edit"):
            evaluate([3.0], done=written)

    @pytest.mark.parametrize("model", ["tiny_bridge"], indirect=True)
    def test_goes_on_where_it_stopped(self, evaluate):
        first = evaluate([0.5], experts=[5])
        first["rows"][0]["perplexity"] = 7.0
        result = evaluate([0.5, 1.0], done=first)
        assert [(row["expert"], row["strength"]) for row in result["rows"]] == [
            (5, 0.5), (17, 0.5), (5, 1.0), (17, 1.0)
        ]  # fmt: skip
        assert result["rows"][0]["perplexity"] == 7.0
        assert evaluate([0.5, 1.0], done=result) == result
        with pytest.raises(ValueError, match="made with other n_tokens"):
            evaluate([0.5], done=first, n_tokens=5)

    @pytest.mark.parametrize("model", ["tiny_bridge"], indirect=True)
    def test_one_sample_is_too_few(self, evaluate):
        with pytest.raises(ValueError, match="n_samples=1: coherence needs at least 2"):
            evaluate([0.5], n_samples=1)


def test_coherence_is_the_mean_cosine_of_pairs():
    sets = torch.randn(2, 5, 7)
    for found, embeddings in zip(coherence(sets), sets, strict=True):
        pairs = itertools.combinations(embeddings, 2)
        cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in pairs]
        close(found, torch.stack(cosines).mean())
    with pytest.raises(ValueError, match="two embeddings or more, got 1"):
        coherence(sets[:, :1])
