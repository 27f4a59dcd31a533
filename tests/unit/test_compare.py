"""Many layers from one pass of the language model."""

import json
import os
import signal

import pytest
import torch
from sae_lens import SAE

from mxd_lens import compare, evaluate, train
from mxd_lens.data.cache import Cached, stored_pairs
from mxd_lens.data.cache import fill as fill_cache
from mxd_lens.data.stream import Part
from mxd_lens.models.site import Site
from mxd_lens.ranks import Ranks
from mxd_lens.report.page import write_comparison_page
from mxd_lens.runs.compare import COMPARED
from mxd_lens.runs.results import read_rows
from mxd_lens.runs.train import Interrupted

from ..helpers import open_reader


@pytest.fixture
def fill(tiny_bridge, documents, tmp_path):
    """``fill(n_tokens, folder)``: cache activations there."""
    site = Site.at(tiny_bridge, 1)

    def fill(n_tokens, folder="activations", source=None, **options):
        def reader(needs):
            return open_reader([site], documents, needs, **options)

        source = source or {"model": "tiny"}
        fill_cache({1: tmp_path / folder}, reader, n_tokens, source, Ranks())
        return tmp_path / folder

    return fill


class TestCachedActivations:
    def test_they_are_the_mlps_input_and_output_at_ordinary_tokens(self, fill, tiny_bridge):
        x, y = stored_pairs(fill(100), 100).split(16, dim=-1)
        torch.testing.assert_close(tiny_bridge.blocks[1].mlp.original_component(x), y)
        assert len(x.unique(dim=0)) > 50

    def test_bfloat16_where_the_model_runs_in_it(self, fill):
        assert stored_pairs(fill(100, autocast_lm=True), 100).dtype == torch.bfloat16

    def test_every_batch_once_in_the_seeds_order(self, fill):
        folder = fill(96)

        def epoch(seed):
            part = Part(1, seed)
            batches = Cached({1: folder}, [part], n_tokens=96, batch_size=32)
            return torch.cat([next(batches)[part] for _ in range(3)])

        torch.testing.assert_close(epoch(0).sort(0).values, stored_pairs(folder, 96).sort(0).values)
        assert torch.equal(epoch(0), epoch(0))
        assert not torch.equal(epoch(0), epoch(1))

    def test_an_interrupted_pass_goes_on_where_it_stopped(self, fill, tiny_bridge, monkeypatch):
        passes = 0
        run = tiny_bridge.run_with_cache

        def counted(*args, **kwargs):
            nonlocal passes
            passes += 1
            if passes == 4:
                raise KeyboardInterrupt
            return run(*args, **kwargs)

        monkeypatch.setattr(tiny_bridge, "run_with_cache", counted)
        whole = fill(60, "whole")
        used = passes
        assert used == 3
        with pytest.raises(KeyboardInterrupt):
            fill(200)
        folder = fill(200)
        assert passes - used < 14
        whole = fill(200, "whole")
        assert (folder / "pairs.bin").read_bytes() == (whole / "pairs.bin").read_bytes()

    def test_other_activations_are_not_mistaken_for_these(self, fill):
        fill(50)
        with pytest.raises(ValueError, match="made with model='tiny', and this asks for"):
            fill(50, source={"model": "large"})

    @pytest.mark.parametrize("n_tokens", [60, 200])
    def test_zeros_and_swapped_rows_are_not_trained_on(self, fill, n_tokens):
        pairs = fill(60) / "pairs.bin"
        good = pairs.read_bytes()
        half = len(good) // 2
        for bad in (bytes(len(good)), good[half:] + good[:half], good[:-1]):
            pairs.write_bytes(bad)
            with pytest.raises(ValueError, match="are damaged"):
                fill(n_tokens)
        pairs.write_bytes(good)
        fill(n_tokens)

    def test_what_a_kill_leaves_behind_the_last_row_is_not_counted(self, fill):
        with (fill(60) / "pairs.bin").open("ab") as file:
            file.write(b"half a row")
        assert torch.equal(stored_pairs(fill(200), 200), stored_pairs(fill(200, "whole"), 200))

    def test_a_layer_is_not_taken_for_them(self, tiny_bridge, documents, make_config):
        cfg = make_config()
        train(cfg, tiny_bridge, documents)
        other = make_config(output=cfg.output + "2", activations=str(cfg.layer_path))
        with pytest.raises(ValueError, match="something else than cached activations"):
            train(other, tiny_bridge, documents)

    def test_more_than_there_are(self, fill):
        with pytest.raises(ValueError, match="does not hold the activations of 5,000 tokens"):
            stored_pairs(fill(50), 5_000)


def test_an_interrupted_comparison_equals_an_undisturbed_one(
    make_compare, tiny_bridge, documents, at_step, tmp_path
):
    whole = compare(make_compare(output=str(tmp_path / "whole")), tiny_bridge, documents)
    sparse = COMPARED[:-1]
    once = [("dense", None)]
    assert [(row["architecture"], row["k"]) for row in whole] == [
        *((name, 2) for name in sparse),
        *once,
        *((name, 3) for name in sparse),
    ]
    assert {row["training_tokens"] for row in whole} == {32 * 40}
    dense = whole[len(sparse)]
    assert dense["d_sae"] == 32 and dense["fvu"] > 0
    assert dense["l0"] is dense["always_on"] is dense["ce_shuffled_gate_matched"] is None

    cfg = make_compare()
    steps = 0

    def interrupt_in_the_fourth_run():
        nonlocal steps
        steps += 1
        if steps == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with at_step(17, interrupt_in_the_fourth_run), pytest.raises(Interrupted):
        compare(cfg, tiny_bridge, documents)
    results = tmp_path / "compare" / "results.json"
    assert len(json.loads(results.read_text())["rows"]) == 3
    assert compare(cfg, tiny_bridge, documents, measured=write_comparison_page) == whole
    assert results.read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert [row["architecture"] for row in read_rows(results)] == [
        *(name for name in sparse for _ in "kk"),
        "dense",
    ]
    page = results.with_suffix(".html").read_text()
    assert "skip transcoder" in page and "dense control" in page and "nats per token" in page


def test_a_finished_comparison_is_only_read(make_compare, tiny_bridge, documents, at_step):
    one = {"architectures": ["topk_transcoder"], "k": [2]}
    cfg = make_compare(**one)
    rows = compare(cfg, tiny_bridge, documents)
    with at_step(0, lambda: pytest.fail("trained again")):
        assert compare(cfg) == rows
    for name, before, now in (("expansion", 16, 8), ("n_sequences", 4, 8)):
        asked = make_compare(**one | {"k": [3], name: now})
        with pytest.raises(ValueError, match=f"made with {name}={before}, and this asks for"):
            compare(asked, tiny_bridge, documents)


def test_an_architecture_without_k_has_a_folder_for_each_seed(make_compare):
    cfg = make_compare(architectures=["dense", "mxd"], seeds=[0, 1])
    folders = [run.output.rpartition("/")[2] for run in cfg.runs()]
    assert sorted(folders) == [
        *(f"layer1-dense-seed{seed}" for seed in (0, 1)),
        *(f"layer1-mxd-k{k}-seed{seed}" for k in (2, 3) for seed in (0, 1)),
    ]


def test_a_later_comparison_adds_to_the_folder(make_compare, tiny_bridge, documents, tmp_path):
    compare(make_compare(architectures=["topk_transcoder"], k=[2]), tiny_bridge, documents)
    rows = compare(
        make_compare(architectures=["topk_transcoder"], k=[2], seeds=[1]), tiny_bridge, documents
    )
    assert [row["seed"] for row in rows] == [1]
    written = read_rows(tmp_path / "compare" / "results.json")
    assert [row["seed"] for row in written] == [0, 1]
    assert written[0]["fvu"] != written[1]["fvu"]


def test_a_row_is_what_the_saved_layer_does(make_compare, tiny_bridge, documents):
    cfg = make_compare(k=[2])
    rows = compare(cfg, tiny_bridge, documents)
    held_out = cfg.documents(documents)[1]
    for row, run in zip(rows, cfg.runs(), strict=True):
        layer = SAE.load_from_disk(run.layer_path)
        again, _ = evaluate(tiny_bridge, layer, held_out, n_sequences=4)
        numbers = {name: v for name, v in again.items() if not isinstance(v, list | dict)}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers)
        for name, sums in again["sequences"].items():
            assert row["sequences"][name] == pytest.approx(sums)


def test_experts_are_worth_what_the_control_of_their_seed_loses_beyond(
    make_compare, tiny_bridge, documents, tmp_path
):
    cfg = make_compare(architectures=["mxd", "dense"], k=[2], seeds=[0, 1])
    rows = compare(cfg, tiny_bridge, documents)
    of_layers = [row for row in rows if row["architecture"] == "mxd"]
    for row, control in zip(of_layers, (r for r in rows if r not in of_layers), strict=True):
        assert row["seed"] == control["seed"] and "worth" not in control
        low, high = row["worth_interval"]
        assert low < row["worth"] < high
        assert row["worth"] == pytest.approx(control["ce_increase"] - row["ce_increase"])
    written = read_rows(tmp_path / "compare" / "results.json")
    assert [row["worth"] for row in written[:2]] == [row["worth"] for row in of_layers]
