"""Editing single activations in a running model, against plain hooks and by hand."""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack, contextmanager

import pytest
import torch
from sae_lens.saes.sae import SAE

from mxd_lens.analysis import judge
from mxd_lens.analysis.embedding import coherence
from mxd_lens.analysis.judge import Judge
from mxd_lens.analysis.steering import (
    PAPER,
    calibrate_strength,
    evaluate_steering,
    generate_steered,
    steer,
    steering_directions,
)
from mxd_lens.models.splice import splice

from ..conftest import N_VOCAB
from ..helpers import close32 as close
from ..helpers import random_layer

LAYERS = ["mxd", "jumprelu_mxd", "molt", "topk_transcoder", "topk_skip_transcoder", "topk"]
ACTS = "blocks.1.mlp.hook_sae_acts_post"
EXPERTS = [5, 17, 30]
AMOUNTS = torch.tensor([0.7, -1.3, 2.0])


@pytest.fixture(params=LAYERS)
def layer(request, lm) -> SAE:
    return random_layer(request.param, lm)


@pytest.fixture
def mxd(lm) -> SAE:
    return random_layer("mxd", lm)


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
    """Logits with ``edit(acts)``, in place, on the activations: by a plain hook."""

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


def test_add_is_a_hook_on_the_activations(lm, layer, in_place, tokens):
    if in_place is IN_PLACE["spliced"] and not hasattr(layer.cfg, "d_out"):
        in_place = assigned  # splice refuses an SAE of the output
    with in_place(lm, layer):
        plain = lm(tokens)
        expected = edited(lm, layer, tokens, lambda acts: add(acts, AMOUNTS))
        assert (expected - plain).abs().max() > 0.05
        with steer(lm, layer, EXPERTS, add=AMOUNTS):
            close(lm(tokens), expected)
        assert torch.equal(lm(tokens), plain)


def test_the_other_edits(lm, mxd, tokens):
    by = torch.randn(40)  # of all experts, so that some are active
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
            with steer(lm, mxd, range(40), **{name: amount}):
                close(lm(tokens), expected)


@pytest.mark.parametrize("positions", [[2], [0, 4, -1], [-2, 99], []])
def test_only_at_some_positions(lm, mxd, tokens, positions):
    where = [p for p in positions if p < 7]
    with splice(lm, {1: mxd}):
        expected = edited(lm, mxd, tokens, lambda acts: add(acts, AMOUNTS, where))
        with steer(lm, mxd, EXPERTS, add=AMOUNTS, positions=positions):
            close(lm(tokens), expected)


def test_beside_the_error_term_the_effect_is_added_to_the_mlps_output(lm, layer, tokens):
    metadata = layer.cfg.metadata
    original, cache = lm.run_with_cache(tokens)
    x = cache[metadata.hook_name]
    clean = layer.decode(layer.encode(x))
    more = layer.encode(x)
    add(more, AMOUNTS, [1, 3])
    effect = layer.decode(more) - clean
    expected = lm.run_with_hooks(
        tokens, fwd_hooks=[(metadata.hook_name_out, lambda y, hook: y + effect)]
    )
    assert (expected - original).abs().max() > 0.05
    with lm.saes([layer], use_error_term=True):
        with steer(lm, layer, EXPERTS, add=0.0):
            close(lm(tokens), original)
        with steer(lm, layer, EXPERTS, add=AMOUNTS, positions=[1, 3]):
            close(lm(tokens), expected)


def test_caches_show_the_edited_activations(lm, mxd, tokens):
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
        acts[..., EXPERTS] *= 0.5

    with splice(lm, {1: mxd}):
        expected = edited(lm, mxd, tokens, both)
        with steer(lm, mxd, EXPERTS, add=AMOUNTS), steer(lm, mxd, EXPERTS, scale=0.5):
            close(lm(tokens), expected)
        with steer(lm, mxd, EXPERTS, scale=0.5), steer(lm, mxd, EXPERTS, add=AMOUNTS):
            assert (lm(tokens) - expected).abs().max() > 0.05
            lm.reset_hooks()
            assert (lm(tokens) - expected).abs().max() > 0.05


@pytest.mark.parametrize("positions", [None, (1, 3)])
def test_directions_are_added_to_the_layers_output(lm, layer, tokens, positions):
    directions = torch.randn(len(EXPERTS), 16)
    amounts = torch.randn(len(tokens), len(EXPERTS))  # each row of the batch its own
    at = torch.zeros(tokens.shape[1], 1)
    at[slice(None) if positions is None else list(positions)] = 1
    change = (amounts @ directions)[:, None] * at
    name = layer.cfg.metadata.hook_name_out
    expected = lm.run_with_hooks(tokens, fwd_hooks=[(name, lambda y, hook: y + change)])
    edit = {"directions": directions, "positions": positions}
    with lm.saes([layer], use_error_term=True), steer(lm, layer, EXPERTS, add=amounts, **edit):
        close(lm(tokens), expected)
    with lm.saes([layer]):
        with steer(lm, layer, EXPERTS, add=2.0, **edit):
            single = lm(tokens)
        with steer(lm, layer, EXPERTS, add=torch.full((3,), 2.0), **edit):
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


@pytest.mark.parametrize(
    ("experts", "edit", "match"),
    [
        ([1], {}, "say one of add, scale, clamp and ablate, got none"),
        ([1], {"add": 1.0, "ablate": True}, "got add and ablate"),
        ([1, 2], {"scale": 2.0, "directions": torch.ones(2, 16)}, "2 rows, with scale"),
        (
            [1, 2],
            {"add": 2.0, "directions": torch.ones(3, 16)},
            "one row for each of the 2 experts, and goes with add: got 3 rows, with add",
        ),
        ([3, 40], {"add": 1.0}, "no expert 40: this layer has experts 0 to 39"),
        ([-1], {"add": 1.0}, "no expert -1"),
        ([3, 3], {"add": 1.0}, r"the same expert twice in \[3, 3\]"),
        ([1, 2], {"add": torch.ones(3)}, r"add has shape \(3,\): for 2 experts"),
        ([1], {"add": torch.ones(3, 1)}, r"add has 3 rows, the batch .* reads 2"),
    ],
)
def test_edits_that_cannot_be_made(lm, mxd, tokens, experts, edit, match):
    with (
        splice(lm, {1: mxd}),
        pytest.raises(ValueError, match=match),
        steer(lm, mxd, experts, **edit),
    ):
        lm(tokens)


def test_a_layer_that_is_not_in_place(lm, mxd):
    with (
        pytest.raises(ValueError, match=r"not in place .*splice\(.*add_sae\("),
        steer(lm, mxd, [1], add=1.0),
    ):
        pass


# What steering makes of the text

PROMPT = "the cat sat"


def writing(lm):
    """The model, without the tokens that its tokenizer does not know."""
    unknown = torch.arange(len(lm.tokenizer), N_VOCAB)
    lm.unembed.register_forward_hook(lambda _, args, y: y.index_fill(-1, unknown, -torch.inf))
    return lm


@pytest.fixture
def writer(lm):
    return writing(lm)


def ridge(acts, y):
    """The normal equations, with a constant; the penalty is the mean square of what is active."""
    read = torch.cat([acts, torch.ones(len(acts), 1)], dim=1)
    penalty = acts[acts > 0].square().mean() * torch.eye(read.shape[1])
    return torch.linalg.solve(read.T @ read + penalty, read.T @ (y - y.mean(0)))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_directions_and_strengths_are_those_asked_for(name):
    layer = random_layer(name)
    x, y_norm, experts = torch.randn(1200, 16), 3.0, [0, 7, 39]
    amounts = calibrate_strength(layer, experts, 0.5, x, y_norm)
    directions = steering_directions(layer, experts, x)
    for expert, amount, row in zip(experts, amounts, directions, strict=True):

        def add_amount(acts, hook, expert=expert, amount=amount):
            return acts + amount * torch.eye(40)[expert]

        found = layer.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", add_amount)])
        close((found - layer(x)).norm(dim=-1).mean(), torch.tensor(0.5 * y_norm))
        plain = layer.W_dec[expert]
        most = (x @ layer.W_enc[:, expert] + layer.b_enc[expert]).sort(descending=True)[1][:32]
        if "mxd" in name:
            plain = ridge(layer.encode(x).to_dense().double(), layer(x).double())[expert].float()
        if name == "molt":
            plain = torch.stack([x[i] @ layer.transform(expert) for i in most]).mean(0)
        close(row, plain)
    amounts = calibrate_strength(layer, experts, 0.5, x, y_norm, directions=directions)
    close((amounts[:, None] * directions).norm(dim=-1), torch.full((3,), 1.5))


def test_an_expert_without_effect_is_an_error():
    layer = random_layer("topk_transcoder")
    layer.W_dec.data[7] = 0
    with pytest.raises(ValueError, match="expert 7 has no effect"):
        calibrate_strength(layer, [3, 7], 1.0, torch.randn(5, 16), 1.0)


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


@pytest.mark.parametrize("directed", [False, True])
def test_each_expert_steers_its_own_samples(writer, layer, directed):
    directions = torch.randn(len(EXPERTS), 16) if directed else None
    amounts = torch.tensor([3.0, -30.0, 9.0] if directed else [5.0, -100.0, 300.0])
    start = int(writer.to_tokens(PROMPT)[0, 0] < 3)  # a BOS token is left alone
    expected = []
    for i, expert in enumerate(EXPERTS):

        def add_direction(y, hook, i=i):
            return torch.cat([y[:, :start], y[:, start:] + amounts[i] * directions[i]], dim=1)

        with ExitStack() as edits:
            if directed:
                hooks = [(layer.cfg.metadata.hook_name_out, add_direction)]
                edits.enter_context(writer.hooks(fwd_hooks=hooks))
            else:
                edits.enter_context(writer.saes([layer], use_error_term=True))
                edit = {"add": amounts[i], "positions": range(start, 20)}
                edits.enter_context(steer(writer, layer, [expert], **edit))
            expected.append([greedily(writer, 6)] * 2)
    assert len({text for text, _ in expected}) > 1
    options = {"prompt": PROMPT, "n_samples": 2, "n_tokens": 6, "temperature": 0.0}
    options |= {"directions": directions, "batch_size": 4}
    assert generate_steered(writer, layer, EXPERTS, amounts, **options) == expected
    unsteered = generate_steered(writer, layer, EXPERTS, 0 * amounts, **options)
    assert unsteered == [[greedily(writer, 6)] * 2] * 3


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


def tokens_of(writer, text):
    """Ids of a text without special tokens."""
    return writer.to_tokens(text, prepend_bos=False)[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.8])
def test_only_the_nucleus_is_sampled(writer, mxd, top_p):
    def sampled(**options):
        options |= {"prompt": PROMPT, "n_samples": 300, "n_tokens": 1}
        (samples,) = generate_steered(writer, mxd, [5], torch.zeros(1), **options)
        return {tokens_of(writer, sample)[0] for sample in samples}

    logits = writer(writer.to_tokens(PROMPT))[0, -1].index_fill(0, torch.tensor([1, 2]), -torch.inf)
    by_rank = sorted(enumerate(logits.softmax(-1).tolist()), key=lambda pair: -pair[1])
    nucleus, together = {}, 0.0
    for token, probability in by_rank:
        if together > top_p:
            break
        nucleus[token] = probability
        together += probability
    found = sampled(top_p=top_p)
    assert found <= nucleus.keys()
    assert found >= {token for token, p in nucleus.items() if p / together > 0.05}
    assert not sampled() <= nucleus.keys() and sampled() == sampled(top_p=1.0)


@torch.no_grad()
def test_the_papers_edit_is_a_hook_on_the_activations_of_a_layer_in_the_mlps_place(writer, layer):
    """+100 at every token, no error term, and a token's logit falls by 1 each time it occurred."""

    def raise_unit(acts, hook):
        return acts + 100 * torch.eye(40)[17]

    tokens = writer.to_tokens(PROMPT)
    n_prompt = tokens.shape[1]
    with writer.saes([layer]):
        (hook,) = (n for n in writer.hook_dict if n.endswith("hook_sae_acts_post"))
        for _ in range(8):
            logits = writer.run_with_hooks(tokens, fwd_hooks=[(hook, raise_unit)])[0, -1]
            logits[[1, 2]] = -torch.inf
            for token in tokens[0]:
                logits[token] -= 1
            tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
    expected = tokens[0, n_prompt:].tolist()
    options = PAPER | {"prompt": PROMPT, "n_tokens": 8, "top_p": 1e-6}
    (samples,) = generate_steered(writer, layer, [17], torch.tensor([100.0]), **options)
    assert [tokens_of(writer, sample) for sample in samples] == [expected] * 10
    (plain,) = generate_steered(
        writer, layer, [17], torch.tensor([100.0]), **options | {"paper": False}
    )
    assert tokens_of(writer, plain[0]) != expected


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


@pytest.fixture
def evaluate(tiny_bridge):
    """``evaluate(strengths, experts=, **options)`` of an MxD, by how many samples differ."""
    lm, mxd, x = writing(tiny_bridge), random_layer("mxd"), torch.randn(20, 16)
    options = {"prompt": PROMPT, "n_samples": 3, "n_tokens": 4}

    def score(samples):
        return {"coherence": len(set(samples)) / len(samples), "perplexity": 1.0}

    def generate(rows, **more):
        amounts = torch.tensor([row["amount"] for row in rows])
        return generate_steered(lm, mxd, [5, 17], amounts, **options | more)

    def evaluate(strengths, experts=(5, 17), **more):
        more = {"judge": score, **options, **more}
        return evaluate_steering(lm, mxd, experts, strengths, x, 2.0, **more)

    evaluate.score, evaluate.generate = score, generate
    return evaluate


def test_a_row_for_each_expert_and_strength(evaluate):
    saved = []
    result = evaluate([0.5, 2.0], name="ours", save=lambda r: saved.append(json.dumps(r)))
    settings = {"edit": "activation", "prompt": PROMPT, "n_samples": 3, "n_tokens": 4}
    settings |= {"temperature": 1.0, "top_p": None, "seed": 0}
    assert {key: result[key] for key in list(result)[:7]} == settings
    assert result["unsteered"].keys() == {"coherence", "perplexity"}
    rows = result["rows"]
    assert [(r["name"], r["expert"], r["strength"]) for r in rows] == [
        ("ours", 5, 0.5), ("ours", 17, 0.5), ("ours", 5, 2.0), ("ours", 17, 2.0)
    ]  # fmt: skip
    close(rows[2]["amount"], 4 * rows[0]["amount"])
    assert [len(json.loads(text)["rows"]) for text in saved] == [2, 4]
    assert json.loads(saved[-1]) == result
    samples = evaluate.generate(rows[:2])
    assert [row["samples"] for row in rows[:2]] == samples
    assert rows[0]["coherence"] == evaluate.score(samples[0])["coherence"]


def test_rows_of_directions(evaluate):
    directions = torch.randn(2, 16)
    result = evaluate([2.0], directions=directions)
    rows = result["rows"]
    assert result["edit"] == "direction"
    amounts = torch.tensor([row["amount"] for row in rows])
    close((amounts[:, None] * directions).norm(dim=-1), torch.full((2,), 4.0))
    assert [row["samples"] for row in rows] == evaluate.generate(rows, directions=directions)
    with pytest.raises(ValueError, match="were made with other edit"):
        evaluate([3.0], done=result)


def test_the_paper_adds_its_strengths_as_they_are(evaluate):
    paper = PAPER | {"prompt": PROMPT, "n_tokens": 4}
    result = evaluate([100.0, -20.0], **paper)
    assert {name: result[name] for name in ("edit", "top_p", "n_samples")} == {
        "edit": "paper", "top_p": 0.1, "n_samples": 10
    }  # fmt: skip
    assert [row["amount"] for row in result["rows"]] == [100.0, 100.0, -20.0, -20.0]
    expected = evaluate.generate(result["rows"][:2], **paper)
    assert [row["samples"] for row in result["rows"][:2]] == expected
    assert evaluate([100.0], done=result, **paper) == result
    with pytest.raises(ValueError, match="goes without directions"):
        evaluate([100.0], directions=torch.randn(2, 16), **paper)


def test_strengths_need_what_calibrates_them(tiny_bridge, mxd):
    with pytest.raises(ValueError, match="by x and y_norm: give both, or paper=True"):
        evaluate_steering(tiny_bridge, mxd, [5], [1.0])


def test_any_callable_is_a_judge(evaluate):
    result = evaluate([0.5], n_samples=1, judge=lambda samples: {"length": len(samples[0])})
    assert result["unsteered"].keys() == {"length"}
    assert all(row["length"] == len(row["samples"][0]) for row in result["rows"])


def test_an_evaluation_goes_on_where_it_stopped(evaluate):
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
    with pytest.raises(ValueError, match="n_samples=1: coherence needs at least 2"):
        evaluate([0.5], n_samples=1, judge=None)


def test_coherence_is_the_mean_cosine_of_pairs():
    sets = torch.randn(2, 5, 7)
    for found, embeddings in zip(coherence(sets), sets, strict=True):
        pairs = itertools.combinations(embeddings, 2)
        cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in pairs]
        close(found, torch.stack(cosines).mean())
    with pytest.raises(ValueError, match="two embeddings or more, got 1"):
        coherence(sets[:, :1])
