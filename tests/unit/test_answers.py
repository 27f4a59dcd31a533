"""What layers answer for themselves: by name, and for a module of ours or of SAELens'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from mxd_lens.layers import answers, architectures, config_class, label, layer_of, width_for
from mxd_lens.layers.mlp import MLPShape, MLPWeights
from mxd_lens.layers.sae import KNOWN, SAELensLayer
from tests.conftest import randomise
from tests.helpers import SPARSE, TRAINING, close, make_layer
from tests.reference import hidden, steps

GPT2 = MLPShape(768, 768, 3072, "gelu_new", gated=False)
SMOLLM2 = MLPShape(576, 576, 1536, "silu", gated=True)


class TestNames:
    def test_every_architecture_answers(self):
        names = architectures()
        assert len(set(names)) == len(names) and {"mxd", "mxd_paper", "dense", "topk"} <= {*names}
        ours = [name for name in names if name not in KNOWN]
        assert len({label(name) for name in names}) == len(names)
        for name in names:
            registered, cfg = SAE_TRAINING_CLASS_REGISTRY[name]
            assert issubclass(answers(name).training_class(), registered)
            assert config_class(name) is cfg and answers(name).default_lr > 0
            assert answers(name).reads_input == (name in ours)
            assert answers(name).has_experts == (name != "dense")

    @pytest.mark.parametrize("ask", [answers, label, config_class, width_for])
    def test_an_unknown_one_is_an_error(self, ask):
        arguments = [GPT2, 32] if ask is width_for else []
        with pytest.raises(ValueError, match=r"unknown architecture 'mixture'; known: .*mxd"):
            ask("mixture", *arguments)


class TestWidth:
    def test_the_references_own_number(self):
        for name in ("mxd", "mxd_paper"):
            assert width_for(name, GPT2, 32, exact=True) == 21_490

    @pytest.mark.parametrize("name", sorted({*architectures()} - {"dense", "molt"}))
    def test_rows_are_multiples_of_64(self, name):
        exact = width_for(name, GPT2, 33, exact=True)
        width = width_for(name, GPT2, 33)
        assert width % 64 == 0 and abs(width - exact) <= 32
        small = MLPShape(2, 2, 2, "relu", gated=False)
        assert width_for(name, small, 20) == width_for(name, small, 20, exact=True) < 64

    @pytest.mark.parametrize("name", sorted({*architectures()} - {"dense", "gated"}))
    @pytest.mark.parametrize("mlp", [GPT2, SMOLLM2])
    def test_real_parameter_counts_agree_within_a_thousandth(self, name, mlp):
        units = 16 * mlp.d_in
        transcoder = 2 * mlp.d_in * units + units + mlp.d_out
        cfg: Any = {
            "d_in": mlp.d_in,
            "d_sae": width_for(name, mlp, 16, exact=True),
            "device": "meta",
        }
        if answers(name).reads_input:
            cfg |= {"d_out": mlp.d_out}
        if "mxd" in name:
            cfg |= {"d_hidden": mlp.d_hidden, "gated": mlp.gated}
        if "matryoshka" in name:
            cfg |= {"matryoshka_widths": [64, cfg["d_sae"]]}
        layer = answers(name).training_class()(config_class(name)(**cfg))
        discarded = ("_aux", "threshold", "log_gate_scale")
        n = sum(p.numel() for name, p in layer.named_parameters() if not name.endswith(discarded))
        assert n == pytest.approx(transcoder, rel=2e-3 if name == "molt" else 1e-3)  # 284 units

    def test_few_transforms_are_not_rounded(self):
        assert width_for("molt", SMOLLM2, 16) == width_for("molt", SMOLLM2, 16, exact=True) == 284

    @pytest.mark.parametrize("mlp", [GPT2, SMOLLM2])
    @pytest.mark.parametrize("expansion", [1, 16])
    def test_the_dense_control_is_as_wide_as_the_mlp(self, mlp, expansion):
        assert width_for("dense", mlp, expansion) == mlp.d_hidden

    def test_a_transcoder_smaller_than_the_layer_without_units(self):
        with pytest.raises(ValueError, match="larger expansion"):
            width_for("mxd", GPT2, 1)


class TestOurs:
    @pytest.mark.parametrize("kind", SPARSE)
    def test_output_codes_and_sparse_term_of_one_pass(self, kind, x):
        layer = make_layer(kind)
        assert layer_of(layer) is layer and layer.sae is layer
        y, codes, sparse = layer.run_with_codes(x)
        terms = steps(layer, x)
        close(y, terms["hook_out"])
        close(codes.to_dense(), terms["hook_sae_acts_post"])
        close(layer.codes(x).to_dense(), terms["hook_sae_acts_post"])
        close(sparse, terms["hook_experts" if "mxd" in kind else "hook_sae_recons"])

    @pytest.mark.parametrize("kind", TRAINING)
    def test_a_start_from_the_mlp_and_its_activations(self, kind, x):
        layer, untouched = make_layer(kind), make_layer(kind)
        untouched.load_state_dict(layer.state_dict())
        act_fn, gate = getattr(layer.cfg, "act_fn", "silu"), {}
        if getattr(layer.cfg, "gated", True):
            gate = {"W_gate": torch.randn(5, 7).double(), "b_gate": torch.randn(7).double()}
        W_in, b_in = torch.randn(5, 7).double(), torch.randn(7).double()
        W_out, y = torch.randn(7, 4).double(), torch.randn(6, 4).double()
        mlp = MLPWeights(W_in, b_in, W_out, y[0], act_fn, **gate)
        layer.init_from(mlp, x, y)
        changed = {
            name
            for name, value in layer.state_dict().items()
            if not torch.equal(value, untouched.state_dict()[name])
        }
        if "paper" in kind:
            assert not changed
        elif "mxd" in kind:
            copied = {"W_hidden": W_in, "b_hidden": b_in}
            copied |= {f"{name[0]}_hidden_gate": weight for name, weight in gate.items()}
            assert changed == {*copied, "gate_mean", "log_gate_scale"}
            close(layer.hidden(x), hidden(layer, copied, x, lambda _, t: t))
            close(layer.gate_mean, x.mean(0))
        else:
            assert changed == {"b_dec"}
            close(layer.b_dec.data, y.mean(0))


SAELENS = [name for name in KNOWN if name in SAE_CLASS_REGISTRY]


class TestSAELensOwn:
    @pytest.fixture
    def sae(self, request) -> Any:
        name, own = request.param
        cls, cfg = SAE_CLASS_REGISTRY[name]
        shape = {"d_in": 5, "d_sae": 11, "dtype": "float64", **own}
        if "transcoder" in name:
            shape |= {"d_out": 4, "apply_b_dec_to_input": False}
        sae = cls(cfg(**shape))
        randomise(sae)
        return sae

    @pytest.mark.parametrize(
        "sae",
        [(name, {}) for name in SAELENS if name != "topk"]
        + [
            ("topk", {"k": 3, "rescale_acts_by_decoder_norm": rescale}) for rescale in (True, False)
        ],
        ids=str,
        indirect=True,
    )
    @torch.no_grad()
    def test_answer_as_a_layer_does(self, sae, x):
        layer = layer_of(sae)
        assert isinstance(layer, SAELensLayer) and layer.sae is sae and layer.has_experts
        acts = sae.encode(x).to_dense()
        y, codes, sparse = layer.run_with_codes(x)
        close(y, sae(x))
        close(codes.to_dense(), acts)
        close(layer.codes(x).to_dense(), acts)
        skip = x @ sae.W_skip.T if hasattr(sae, "W_skip") else 0
        close(sparse + skip, y)
        for unit in range(11):  # each direction is what one more of its activation adds
            more = acts.clone()
            more[:, unit] += 1.0
            added = sae.decode(more) - sae.decode(acts)
            direction = layer.steering_directions(torch.tensor([unit]), x)
            close(direction.expand(6, -1), added, rtol=1e-6, atol=1e-9)
            close(layer.effect_norms(torch.tensor([unit]), x), added.norm(dim=-1)[:1])

    @pytest.mark.parametrize("sae", [("abstopk", {"k": 3})], ids=str, indirect=True)
    def test_one_that_is_not_known_is_an_error(self, sae):
        with pytest.raises(ValueError, match=r"unknown architecture 'abstopk' of \w+: derive it"):
            layer_of(sae)
