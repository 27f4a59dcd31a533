"""Many layers in place at once, against the spliced model."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE

from mxd_lens import ManyConfig, replace, train_many
from mxd_lens.analysis.jacobian import jacobians
from mxd_lens.analysis.joint import continuations, evaluate_jointly, spread_evenly
from mxd_lens.layers import layer_of
from mxd_lens.layers.mxd import MxD
from mxd_lens.models.site import Site
from mxd_lens.models.splice import splice

from ..conftest import TINY_RUNS
from ..helpers import BesideBos, placed, random_layer, same

N_LAYERS = 3


@pytest.fixture
def tokens(lm):
    texts = ["the cat sat on a dog and ran", "one fish ran after a dog that sat"]
    return [lm.to_tokens(text)[:, :8] for text in texts]


def test_numbers_of_layers_double_and_are_spread_over_depth():
    assert spread_evenly([7]) == [[7]]
    assert spread_evenly(range(30))[:3] == [[15], [7, 22], [3, 11, 18, 26]]
    assert [len(subset) for subset in spread_evenly(range(30))] == [1, 2, 4, 8, 16, 30]
    assert [len(subset) for subset in spread_evenly(range(4))] == [1, 2, 4]


@pytest.mark.parametrize("name", ["mxd", "topk_skip_transcoder"])
def test_what_is_lost_is_what_the_spliced_model_loses(lm, tokens, name):
    layers = {i: placed(random_layer(name, lm, 0.2), lm, i) for i in range(N_LAYERS)}
    found = evaluate_jointly(lm, layers, tokens)
    assert [of_n["layers"] for of_n in found["replaced"]] == [[1], [0, 2], [0, 1, 2]]
    special, n = Site.at(lm, 0).special, 0
    losses, errors = [0.0] * 3, []
    ends = [f"blocks.{i}.hook_resid_post" for i in range(N_LAYERS)]
    if ends[0] not in lm.hook_dict:
        ends = [f"blocks.{i}.hook_out" for i in range(N_LAYERS)]
    for batch in tokens:
        originals = [lm.blocks[i].mlp for i in range(N_LAYERS)]
        assert (
            torch.isin(batch[:, 0], special).all() and not torch.isin(batch[:, 1:], special).any()
        )
        targets, before = batch[:, 1:, None], lm(batch).log_softmax(-1)[:, :-1]
        n += targets.numel()
        for j, of_n in enumerate(found["replaced"]):
            beside = {i: BesideBos(layers[i], originals[i]) for i in of_n["layers"]}
            with splice(lm, beside):
                logits, replaced = lm.run_with_cache(batch, names_filter=ends)
                after = logits.log_softmax(-1)[:, :-1]
            losses[j] += (before - after).gather(-1, targets).sum().item()
        original = lm.run_with_cache(batch, names_filter=ends)[1]
        of_ends = [(original[end][:, 1:], replaced[end][:, 1:]) for end in ends]
        errors.append(
            torch.stack([(b - a).square().sum(-1) / b.square().sum(-1) for b, a in of_ends])
        )
    expected = [loss / n for loss in losses]
    assert [of_n["ce_increase"] for of_n in found["replaced"]] == pytest.approx(expected, rel=1e-3)
    for of_n in found["replaced"]:
        low, high = of_n["kl_interval"]
        assert 0 < low <= of_n["kl"] <= high
    expected = torch.cat(errors, dim=-1).flatten(1).mean(1).tolist()
    assert found["error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["mxd", "topk_skip_transcoder"])
def test_each_beside_the_others_is_the_spliced_models(lm, tokens, name):
    layers = {i: placed(random_layer(name, lm, 0.2), lm, i) for i in range(N_LAYERS)}
    controls = {1: placed(random_layer("dense", lm, 0.2), lm, 1)}
    found = evaluate_jointly(lm, layers, tokens, each=True, controls=controls)
    originals = {i: lm.blocks[i].mlp for i in range(N_LAYERS)}

    def loss(**instead):
        """With layers at all MLPs but those named, as m0: what is there."""
        inside = {i: instead.get(f"m{i}", layers[i]) for i in range(N_LAYERS)}
        total = n = 0
        for batch in tokens:
            beside = {i: BesideBos(f, originals[i]) for i, f in inside.items() if f is not None}
            with splice(lm, beside):
                said = lm(batch).log_softmax(-1)[:, :-1].gather(-1, batch[:, 1:, None])
            total, n = total - said.sum().item(), n + said.numel()
        return total / n

    reads: dict[int, list[torch.Tensor]] = {i: [] for i in layers}

    def reading(i):
        def read(x):
            reads[i].append(x[0])
            return layers[i](x)

        return read

    with splice(lm, {i: BesideBos(reading(i), originals[i]) for i in layers}):
        for batch in tokens:
            lm(batch)

    def at_mean(i):
        """The layer with its sparse term at its mean, from the layer's own pieces."""
        sae = layers[i]
        mean = (sae.encode(torch.cat(reads[i])) @ sae.W_dec).mean(0)
        if name == "mxd":
            return lambda x: sae.hidden(x) @ sae.W_shared * mean + sae.b_dec
        return lambda x: mean + sae(x) - sae.encode(x) @ sae.W_dec

    def nothing(x):
        return torch.zeros_like(x)

    here = loss()
    for i, row in enumerate(found["in_place"]):
        sae, x = layers[i], torch.cat(reads[i])
        y = torch.cat([originals[i](part[None])[0] for part in reads[i]])
        error, active = (sae(x) - y).square().sum(), sae.encode(x) != 0
        assert row["fvu"] == pytest.approx(
            (error / (y - y.mean(0)).square().sum()).item(), rel=1e-3
        )
        assert row["l0"] == pytest.approx(active.sum(1).float().mean().item())
        assert row["alive_fraction"] == pytest.approx(active.any(0).float().mean().item())
        without, removed = loss(**{f"m{i}": None}), loss(**{f"m{i}": nothing})
        assert row["ce_increase"] == pytest.approx(here - without, rel=1e-3, abs=1e-6)
        share = (loss(**{f"m{i}": at_mean(i)}) - here) / (removed - without)
        assert row["share"] == pytest.approx(share, rel=1e-2, abs=1e-4)
        of_first = jacobians(layer_of(sae), originals[i], reads[i][0])["jacobian_cosine"]
        assert row["jacobian_cosine"] == pytest.approx(of_first, rel=1e-3)
        assert abs(row["shuffled"]) > 1e-4
    assert found["in_place"][1]["worth"] == pytest.approx(
        loss(m1=controls[1]) - here, rel=1e-3, abs=1e-6
    )
    assert ["worth" in row for row in found["in_place"]] == [False, True, False]
    everywhere = {f"m{i}": at_mean(i) for i in range(N_LAYERS)}
    original, gates = loss(m0=None, m1=None, m2=None), loss(**everywhere)
    removed = loss(m0=nothing, m1=nothing, m2=nothing)
    assert found["ce_mean_gates"] == pytest.approx(gates - original, rel=1e-3, abs=1e-6)
    assert found["ce_zero_ablation"] == pytest.approx(removed - original, rel=1e-3)
    assert found["share"] == pytest.approx((gates - here) / (removed - original), rel=1e-2)


def test_exact_copies_lose_nothing_together(lm, tokens):
    layers = {i: placed(MxD.from_mlp(lm.blocks[i].mlp), lm, i) for i in range(N_LAYERS)}
    found = evaluate_jointly(lm, layers, tokens, each=True)
    for of_n in found["replaced"]:
        assert [of_n["ce_increase"], of_n["kl"]] == pytest.approx([0, 0], abs=1e-5)
    for row in found["in_place"]:  # the same sparse term at every token
        names = ("ce_increase", "fvu", "share", "shuffled")
        assert [row[name] for name in names] == pytest.approx([0] * 4, abs=1e-4)
        assert row["jacobian_cosine"] == pytest.approx(1, abs=1e-4)
    assert found["error"] == pytest.approx([0] * N_LAYERS, abs=1e-6)


class BesideSpecial(BesideBos):
    """A layer in place of an MLP everywhere but at special tokens."""

    special: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.special, self.mlp(x), self.layer(x))


def test_continuations_are_the_spliced_models(lm):
    prompts = ["the cat sat", "one fish"]
    assert continuations(lm, {}, prompts, 5) == continuations(
        lm, {i: placed(MxD.from_mlp(lm.blocks[i].mlp), lm, i) for i in range(N_LAYERS)}, prompts, 5
    )
    layers = {i: placed(random_layer("mxd", lm, 0.5), lm, i) for i in range(N_LAYERS)}
    beside = {i: BesideSpecial(layers[i], lm.blocks[i].mlp) for i in range(N_LAYERS)}
    special, expected = Site.at(lm, 0).special, []
    with splice(lm, beside):
        for prompt in prompts:
            tokens = lm.to_tokens(prompt)
            n_prompt = tokens.shape[1]
            for _ in range(5):
                for module in beside.values():
                    module.special = torch.isin(tokens, special)[..., None]
                tokens = torch.cat([tokens, lm(tokens)[:, -1:].argmax(-1)], dim=1)
            expected.append(lm.tokenizer.decode(tokens[0, n_prompt:]))
    assert continuations(lm, layers, prompts, 5) == expected != continuations(lm, {}, prompts, 5)


class TestReplace:
    @pytest.fixture
    def folder(self, tiny_bridge, documents, tmp_path):
        options = {"architectures": ["mxd", "dense"], "k": [2], "training_tokens": 64}
        cfg = ManyConfig(**TINY_RUNS | options | {"layers": [0, 2], "output": str(tmp_path / "a")})
        train_many(cfg.runs(), tiny_bridge, documents)
        return tmp_path / "a"

    def test_the_layers_of_a_folder_are_in_place_together(self, folder, tiny_bridge):
        tokens = tiny_bridge.to_tokens("the cat sat")
        before = tiny_bridge(tokens)
        paths = {i: folder / f"layer{i}-mxd-k2-seed0" / "layer" for i in (0, 2)}
        layers = {i: SAE.load_from_disk(path) for i, path in paths.items()}
        with splice(tiny_bridge, layers):
            expected = tiny_bridge(tokens)
        with replace(tiny_bridge, folder, architecture="mxd"):
            same(tiny_bridge(tokens), expected)
        with replace(tiny_bridge, layers):
            same(tiny_bridge(tokens), expected)
        same(tiny_bridge(tokens), before)
        replace(tiny_bridge, folder, architecture="mxd", k=2, seed=0)
        same(tiny_bridge(tokens), expected)

    def test_which_layers_has_to_be_clear(self, folder, tiny_bridge):
        with pytest.raises(ValueError, match=r"several layers for one MLP .*dense control.*say w"):
            replace(tiny_bridge, folder)
        with pytest.raises(ValueError, match=r"no layer of .*'k': 3.*it has layer 0: MxD"):
            replace(tiny_bridge, folder, k=3)
        tiny_bridge.blocks[0].mlp.original_component.up_proj.weight.data += 1
        with pytest.raises(ValueError, match="begun with another model"):
            replace(tiny_bridge, folder, architecture="mxd")


def test_layers_that_belong_elsewhere(lm, tokens):
    layer = placed(random_layer("mxd", lm), lm, 1)
    with pytest.raises(ValueError, match="given for MLP 0 was trained at MLP 1"):
        evaluate_jointly(lm, {0: layer}, tokens)
    with pytest.raises(ValueError, match="no layers"):
        evaluate_jointly(lm, {}, tokens)
