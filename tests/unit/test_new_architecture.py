"""An architecture that only this file knows goes through everything the package does."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from torch import Tensor, nn

from mxd_lens import layers
from mxd_lens.cli import main
from mxd_lens.layers.base import TrainingPairConfig, TrainingSparseLayer
from mxd_lens.layers.codes import Codes
from mxd_lens.layers.transcoder import TopKTranscoder, TopKTranscoderConfig
from mxd_lens.runs.results import VERSION, read_rows

from ..conftest import D_MODEL

# --8<-- [start:architecture]


@dataclass(kw_only=True)
class GainTranscoderConfig(TopKTranscoderConfig):
    @classmethod
    def architecture(cls) -> str:
        return "gain_transcoder"


@dataclass(kw_only=True)
class TrainingGainTranscoderConfig(GainTranscoderConfig, TrainingPairConfig):
    """The recipe has no fields of its own."""


class GainTranscoder(TopKTranscoder):
    """y = g * (a W_dec) + b_dec, with a gain g [d_out]."""

    label = "gain transcoder"
    default_lr = 2e-2

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.gain = nn.Parameter(torch.ones_like(self.b_dec))

    def combine(
        self, x: Float[Tensor, "*batch d_in"], codes: Codes
    ) -> Float[Tensor, "*batch d_out"]:
        decoded = codes.decode(self.W_dec, unit_norm=self.unit_norm_decoder)
        return self.hook_sae_recons(self.gain * decoded + self.b_dec)

    @torch.no_grad()
    def steering_directions(
        self, units: Tensor, x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n d_out"]:
        return self.gain * self.W_dec[units]


class TrainingGainTranscoder(GainTranscoder, TrainingSparseLayer):
    """Rows of W_dec are kept at unit norm."""


def register() -> None:
    name = "gain_transcoder"
    register_sae_class(name, GainTranscoder, GainTranscoderConfig)
    register_sae_training_class(name, TrainingGainTranscoder, TrainingGainTranscoderConfig)


# --8<-- [end:architecture]


@pytest.fixture
def registered(monkeypatch):
    for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY):
        monkeypatch.delitem(registry, "gain_transcoder", raising=False)
    register()
    yield
    for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY):
        del registry["gain_transcoder"]


def test_nobody_knows_it_before_it_is_registered():
    with pytest.raises(ValueError, match=r"unknown architecture 'gain_transcoder'; known: .*mxd"):
        layers.label("gain_transcoder")
    layer = GainTranscoder(GainTranscoderConfig(d_in=4, d_out=4, d_sae=8, k=2))
    assert layers.layer_of(layer) is layer


def test_it_goes_through_everything(
    registered, llama_folder, text, labelled, tmp_path, offline, capsys
):
    out = tmp_path / "out"
    sizes = "--training_tokens 1280 --batch_size 32 --context_size 8 --lm_batch_size 4"
    sizes += " --heldout_documents 40 --expansion 4 --k 3 --n_sequences 8 --layers 1"
    what = f"--model {llama_folder} --dataset {text} --output {out} --device cpu"
    main(f"compare {what} {sizes} --architectures mxd gain_transcoder dense".split())
    (row,) = (row for row in read_rows(out / "results.json") if "gain" in row["architecture"])
    assert row["lr"] == 2e-2 and row["d_sae"] == 4 * D_MODEL and row["l0"] <= 3
    assert row["ce_shuffled_gate"] != row["ce_replaced"] > 0

    run = out / "layer1-gain_transcoder-k3-seed0"
    layer = SAE.load_from_disk(run / "layer")
    assert isinstance(layer, GainTranscoder) and (layer.gain != 1).any()
    x = torch.randn(5, D_MODEL)
    top = (x @ layer.W_enc + layer.b_enc).topk(3)
    acts = torch.zeros(5, layer.cfg.d_sae).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(layer(x), layer.gain * (acts @ layer.W_dec) + layer.b_dec)

    main(f"probe {run} --data {labelled} --n_texts 40 --n_splits 1".split())
    assert "| neurons |" in capsys.readouterr().out
    main(f"experts {run} --n_tokens 500 --sample_tokens 3".split())
    assert "are meaningful" in capsys.readouterr().out
    main(f"steer {run} --n_experts 2 --n_samples 2 --sample_tokens 3 --strengths 1".split())
    assert "| gain_transcoder | 1 | 2 |" in capsys.readouterr().out
    main(["graph", str(run), "--prompt", "the cat sat on"])
    assert "1 of 3 MLPs have a layer; 12 experts are active" in capsys.readouterr().out
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    with pytest.raises(SystemExit, match=r"experts.json was made with n_tokens=500, and this asks"):
        main(f"experts {run} --n_tokens 501".split())
    for name in ("probe", "experts", "steering"):
        assert json.loads((run / f"{name}.json").read_text())["version"] == VERSION
    directions = layer.steering_directions(torch.arange(layer.cfg.d_sae), x)
    torch.testing.assert_close(directions, layer.W_dec * layer.gain)
    every = torch.arange(layer.cfg.d_sae)
    written = layer.write_rows(every, torch.randn(len(every), D_MODEL))
    torch.testing.assert_close(written, layer.W_dec * layer.gain)
    page = (run / "report.html").read_text()
    assert "gain transcoder, k = 3" in page and "dense control" in page
    assert "mxd-lens experts" not in page
