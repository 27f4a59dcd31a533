"""The paper's settings, as `mxd-lens train --config_path` takes them."""

import pytest

from mxd_lens.cli import CONFIGS, main, make_parser

PAPER = {
    "gpt2-124m": (8, 1e-4),
    "pythia-410m": (15, 2e-4),
    "pythia-1.4b": (12, 2e-4),
    "llama-3.2-3b": (12, 1e-4),
}
"""Layer and learning rate."""


def parse(*arguments):
    return make_parser().parse_args(["train", *arguments]).cfg


def test_all_are_packaged():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_layers_and_learning_rates_are_the_papers(name):
    cfg = parse("--config_path", name)
    (run,) = cfg.runs()
    assert (run.layer, run.peak_lr, run.architecture) == (*PAPER[name], "mxd_paper")
    assert (cfg.batch_size, cfg.context_size, cfg.training_tokens) == (4096, 128, 480_000_000)
    assert (run.warm_up_and_decay, cfg.streaming, cfg.expansion) == ((5000, 0), True, 32)


def test_options_override_the_file(tmp_path):
    cfg = parse("--config_path", "gpt2-124m", "--k", "64", "--output", str(tmp_path))
    assert (cfg.model, cfg.k, cfg.output) == ("gpt2", [64], str(tmp_path))


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
    common = ["--model", "m", "--layers", "0", "--dataset", "d", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"^mxd-lens: .*{message}"):
        main(["train", "--config_path", str(path), *common])
