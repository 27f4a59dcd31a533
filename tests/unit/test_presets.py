"""The paper's settings, as `mxd-lens train --config_path` takes them."""

import pytest

from mxd_lens.cli import CONFIGS, main, make_parser
from mxd_lens.layers import answers, width_for
from mxd_lens.layers.mlp import MLPShape

PAPER = {
    "gpt2-124m": (8, 1e-4, MLPShape(768, 768, 3072, "gelu_new", False)),
    "pythia-410m": (15, 2e-4, MLPShape(1024, 1024, 4096, "gelu", False)),
    "pythia-1.4b": (12, 2e-4, MLPShape(2048, 2048, 8192, "gelu", False)),
    "llama-3.2-3b": (12, 1e-4, MLPShape(3072, 3072, 8192, "silu", True)),
}
"""Layer, learning rate and shape of the MLP."""


def parse(*arguments):
    return make_parser().parse_args(["train", *arguments]).cfg


def test_all_are_packaged():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_layers_and_learning_rates_are_the_papers(name):
    cfg = parse("--config_path", name)
    assert (cfg.layer, cfg.peak_lr, cfg.architecture) == (*PAPER[name][:2], "mxd_paper")
    assert (cfg.batch_size, cfg.context_size, cfg.training_tokens) == (4096, 128, 480_000_000)
    assert (cfg.warm_up_and_decay, cfg.streaming, cfg.expansion) == ((5000, 0), True, 32)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("architecture", ["mxd", "topk_transcoder", "topk_skip_transcoder", "topk"])
def test_all_architectures_have_as_many_parameters(name, architecture):
    mlp = PAPER[name][2]
    budget = 32 * mlp.d_in * (mlp.d_in + mlp.d_out)
    width = width_for(architecture, mlp, 32)
    assert width == answers(architecture).width_for(budget, mlp)
    dense = {"mxd": mlp.n_hidden, "topk_skip_transcoder": mlp.d_in * mlp.d_out}
    per_unit = 2 * mlp.d_out if architecture == "topk" else mlp.d_in + mlp.d_out
    total = width * per_unit + dense.get(architecture, 0)
    assert total == pytest.approx(budget, rel=1e-3)


def test_the_width_that_the_paper_names():
    assert width_for("mxd_paper", PAPER["gpt2-124m"][2], 32) == 21_490


def test_options_override_the_file(tmp_path):
    cfg = parse("--config_path", "gpt2-124m", "--k", "64", "--output", str(tmp_path))
    assert (cfg.model, cfg.k, cfg.output) == ("gpt2", 64, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "own.yaml is no configuration"),
        ("3", "own.yaml is no configuration"),
        ("width: 3", "own.yaml is no configuration: .*width"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    if content is not None:
        path.write_text(content)
    common = ["--model", "m", "--layer", "0", "--dataset", "d", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"^mxd-lens: .*{message}"):
        main(["train", "--config_path", str(path), *common])


def test_a_warm_up_that_is_longer_than_the_run():
    with pytest.raises(ValueError, match="lr_warm_up_steps=5000 and lr_decay_steps=0 are more"):
        parse("--config_path", "gpt2-124m", "--training_tokens", "40960")
