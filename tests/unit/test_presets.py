"""The paper's settings, built without their weights."""

import json
import math

import pytest

from mxd_lens.cli import main
from mxd_lens.runs.presets import PRESETS, dry_run

PARAMETER_COUNTS = {  # 32x transcoders: d_in * 32 d_in, twice, and biases
    "gpt2-124m": 37_774_080,
    "pythia-410m": 67_142_656,
    "pythia-1.4b": 268_503_040,
    "llama-3.2-3b": 604_081_152,
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("architecture", ["mxd", "topk_transcoder", "topk_skip_transcoder", "topk"])
def test_all_architectures_have_as_many_parameters(name, architecture):
    preset = PRESETS[name]
    shapes = dry_run(preset, preset.train_config(architecture=architecture))
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == pytest.approx(PARAMETER_COUNTS[name], rel=1e-3)


def test_layers_and_learning_rates_are_the_papers():
    assert {name: (preset.layer, preset.lr) for name, preset in PRESETS.items()} == {
        "gpt2-124m": (8, 1e-4),
        "pythia-410m": (15, 2e-4),
        "pythia-1.4b": (12, 2e-4),
        "llama-3.2-3b": (12, 1e-4),
    }


def test_the_command_shows_the_papers_recipe(capsys):
    main(["train", "--preset", "gpt2-124m", "--dry_run", "--k", "64", "--output", "elsewhere"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["shapes"]["W_enc"] == [768, 21_490]
    assert shown["shapes"]["W_hidden"] == [768, 3072]
    assert "W_hidden_gate" not in shown["shapes"]
    config = shown["config"]
    assert (config["model"], config["layer"], config["k"]) == ("gpt2", 8, 64)
    assert (config["recipe"], config["output"]) == ("paper", "elsewhere")
    assert (config["batch_size"], config["context_size"]) == (4096, 128)
    assert (config["lr_warm_up_steps"], config["lr_decay_steps"]) == (5000, 0)
    assert config["training_tokens"] == 480_000_000


def test_llama_is_gated():
    preset = PRESETS["llama-3.2-3b"]
    assert dry_run(preset, preset.train_config())["W_hidden_gate"] == (3072, 8192)


def test_a_dry_run_of_nothing(tmp_path):
    with pytest.raises(SystemExit, match="name one with --preset"):
        main(f"train --dry_run --model m --layer 0 --dataset d --output {tmp_path}".split())


def test_no_such_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--preset", "gpt5"])
    assert "invalid choice: 'gpt5'" in capsys.readouterr().err
