"""Files that are not what this package or SAELens has written are named in one sentence."""

import pickle

import pytest
import torch
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import save_file

from mxd_lens import CompareConfig, compare, train, write_report
from mxd_lens.cli import main
from mxd_lens.runs.analyse import SteerConfig, run_steer
from mxd_lens.runs.config import finished_runs

from ..conftest import TINY_RUNS
from ..helpers import ANALYSES, write_comparison, write_run

FOREIGN = ["[]", "{}", "3", '{"a": 1}', '[{"a": 1}]', "null", '{"version": 3}']
OLDER = '{"version": 1}'


@pytest.fixture
def run(tiny_bridge, documents, make_config):
    """The folder of a run that is trained and not measured."""
    cfg = make_config(architecture="topk")
    train(cfg, tiny_bridge, documents)
    return cfg.layer_path.parent


class TestReport:
    @pytest.mark.parametrize("content", [*FOREIGN, OLDER])
    @pytest.mark.parametrize("name", ["results", "experts", "labels", "probe", "steering"])
    def test_a_file_of_the_run(self, tmp_path, name, content):
        run = write_run(tmp_path / "run")
        (run / f"{name}.json").write_text(content)
        said = "not what mxd-lens writes there"
        if content == OLDER:
            said += ".*version=1, this mxd-lens reads 3"
        with pytest.raises(ValueError, match=rf"{name}\.json is {said}"):
            write_report(run)

    @pytest.mark.parametrize("content", ["[]", "{}", "3", '{"a": 1}'])
    def test_its_configuration(self, tmp_path, content):
        run = write_run(tmp_path / "run")
        (run / "runner_cfg.json").write_text(content)
        with pytest.raises(SystemExit, match=r"runner_cfg\.json is not "):
            main(["report", str(run)])

    @pytest.mark.parametrize("name", ["results", "same/results"])
    @pytest.mark.parametrize("content", ["[]", "3", '[{"a": 1}]'])
    def test_a_file_of_the_comparison(self, tmp_path, name, content):
        run = write_run(tmp_path / "mxd")
        write_run(tmp_path / "same", "topk_transcoder")
        write_comparison(tmp_path, {}, {"architecture": "topk_transcoder"})
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises(ValueError, match=rf"{name}\.json is not what mxd-lens writes there"):
            write_report(run)

    def test_a_file_that_is_cut_off(self, tmp_path):
        run = write_run(tmp_path / "run")
        (run / "experts.json").write_text('{"texts": [')
        with pytest.raises(ValueError, match=r"experts\.json is not JSON"):
            write_report(run)


class TestAnalyses:
    @pytest.mark.parametrize("content", [*FOREIGN, OLDER])
    @pytest.mark.parametrize("name", ANALYSES)
    def test_a_file_where_theirs_goes(self, tmp_path, name, content):
        run = write_run(tmp_path / "run", "topk")
        save_file({"sparsity": torch.zeros(12)}, run / "layer" / SPARSITY_FILENAME)
        (run / f"{name}.json").write_text(content)
        analyse, cfg_class = ANALYSES[name]
        with pytest.raises(ValueError, match=rf"{name}\.json is not what mxd-lens writes there"):
            analyse(cfg_class(run=str(run)))

    def test_how_often_units_fire(self, run):
        (run / "layer" / "sparsity.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"sparsity\.safetensors does not say how often units"):
            run_steer(SteerConfig(run=str(run)))


class TestLayer:
    @pytest.mark.parametrize("content", ["[]", "{}", "3", '{"a": 1}', '{"architecture": "topk"}'])
    def test_its_configuration(self, run, content):
        (run / "layer" / "cfg.json").write_text(content)
        with pytest.raises(ValueError, match=r"layer/cfg\.json is not what mxd-lens writes there"):
            run_steer(SteerConfig(run=str(run)))
        with pytest.raises(SystemExit, match=r"^mxd-lens: .*layer/cfg\.json is not what "):
            main(["evaluate", str(run), "--dataset", "nowhere.txt"])

    @pytest.mark.parametrize("how", ["truncated", "empty", "of another layer"])
    def test_its_weights(self, run, how, make_config, tiny_bridge, documents):
        weights = run / "layer" / "sae_weights.safetensors"
        if how == "of another layer":
            other = make_config(architecture="topk", d_sae=7, output=str(run.with_name("other")))
            train(other, tiny_bridge, documents)
            weights.write_bytes((other.layer_path / "sae_weights.safetensors").read_bytes())
        else:
            weights.write_bytes(weights.read_bytes()[: 100 if how == "truncated" else 0])
        message = r"sae_weights\.safetensors does not hold the weights of the layer that cfg\.json"
        with pytest.raises(SystemExit, match=rf"^mxd-lens: .*{message}"):
            main(["evaluate", str(run), "--dataset", "nowhere.txt"])
        with pytest.raises(ValueError, match=message):
            train(make_config(architecture="topk"))  # finished: only loaded

    def test_weights_are_never_unpickled(self, run, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (tmp_path / "exploded").touch, ()

        (run / "layer" / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(SystemExit, match="does not hold the weights"):
            main(["evaluate", str(run), "--dataset", "nowhere.txt"])
        assert not (tmp_path / "exploded").exists()


def test_a_configuration_with_fields_of_another_program(run, edit_json):
    edit_json(run / "runner_cfg.json", k=0, n_layers=3)
    message = r"runner_cfg\.json is not .* k=0: must be at least 1; n_layers=3: Unexpected"
    with pytest.raises(ValueError, match=message):
        finished_runs(run)


def test_a_comparisons_folder_before_anything_is_trained(tiny_bridge, documents, at_step, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    cfg = CompareConfig(**TINY_RUNS | {"output": str(tmp_path), "architectures": ["topk"]})
    with (
        at_step(0, lambda: pytest.fail("trained first")),
        pytest.raises(ValueError, match=r"other/results\.json is not what mxd-lens writes there"),
    ):
        compare(cfg, tiny_bridge, documents)
