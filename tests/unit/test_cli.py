"""The commands, on a tiny model saved on disk and a local text file."""

import argparse
import html
import json
import re
import sys

import pytest
import torch
from sae_lens import SAE

from mxd_lens.analysis.joint import PROMPTS
from mxd_lens.cli import COMMANDS, main, make_parser
from mxd_lens.runs.results import Ablations, Joint, read, read_rows


@pytest.fixture
def run(llama_folder, text, capsys):
    """``run(command, *arguments)``: what it printed."""
    common = f"--model {llama_folder} --layers 1 --dataset {text} --training_tokens 640 "
    common += "--batch_size 32 --context_size 8 --lm_batch_size 4 --heldout_documents 40 "
    common = f"{common} --device cpu".split()

    def run(command: str, *arguments: str) -> str:
        main([command, *(common if command in ("train", "compare") else []), *arguments])
        return capsys.readouterr().out

    return run


def test_compare_then_evaluate_all_on_other_text(run, tmp_path):
    folder = tmp_path / "frontier"
    arguments = f"--output {folder} --expansion 8 --n_sequences 4 --k 2 3"
    table = run("compare", *arguments.split(), "--architectures", "topk_transcoder", "dense")
    rows = read_rows(folder / "results.json")
    found = [(row["architecture"], row["k"]) for row in rows]
    assert found == [("topk_transcoder", 2), ("topk_transcoder", 3), ("dense", None)]
    assert all(f"| {row['ce_increase']:.4f} |" in table for row in rows)
    page = (folder / "results.html").read_text()
    assert all(f"<td>{row['ce_increase']:.4f}</td>" in page for row in rows)

    one = folder / "layer1-topk_transcoder-k2-seed0" / "results.json"
    measured = json.loads(one.read_text())
    run("evaluate", str(one.parent), "--n_sequences", "4")
    assert json.loads(one.read_text()) == measured

    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["the dog saw a cat on the mat after the fish"] * 200))
    table = run("evaluate", str(folder), "--dataset", str(other), "--n_sequences", "4")
    (found,) = folder.glob("results-other-*.json")
    again = read_rows(found)
    assert [row["k"] for row in again] == [row["k"] for row in rows]
    assert all(row["dataset"] == str(other) for row in again)
    assert all(a["ce_original"] != b["ce_original"] for a, b in zip(again, rows, strict=True))
    assert found.with_suffix(".html").exists()
    with pytest.raises(SystemExit, match="say on which --dataset"):
        run("evaluate", str(folder))


def test_layers_of_several_mlps_are_put_in_place_at_once(run, tmp_path):
    folder = tmp_path / "many"
    arguments = f"--output {folder} --layers 0 1 2 --expansion 8 --n_sequences 4 --k 2"
    run("compare", *arguments.split(), "--architectures", "topk_transcoder", "mxd")
    printed = run("evaluate", str(folder), "--joint", "--each", "--n_sequences", "4")
    joint = read(folder / "joint.json", Joint)
    assert [(row.architecture, row.k, row.seed) for row in joint.rows] == [
        ("mxd", 2, 0),
        ("topk_transcoder", 2, 0),
    ]
    page = (folder / "joint.html").read_text()
    for row in joint.rows:
        assert [of_n.layers for of_n in row.replaced] == [[1], [0, 2], [0, 1, 2]]
        assert len(row.error) == 3 and row.dataset.endswith("(held out)")
        for of_n in row.replaced:
            assert f"{of_n.ce_increase:.4f} |" in printed
            assert f"<td>{of_n.ce_increase:.4f}</td>" in page
        assert [text.prompt for text in row.continuations] == list(PROMPTS)
        for text in row.continuations:
            assert html.escape(" ".join(text.replaced.split())) in page

    tuned, sizes = tmp_path / "tuned", "--architecture mxd --training_tokens 64 --lm_batch_size 4"
    printed = run("finetune", str(folder), "--output", str(tuned), *sizes.split())
    assert "| before | 3 |" in printed and "| after | 3 |" in printed
    assert "| MxD, k = 2 | 3 |" in run("evaluate", str(tuned), "--joint", "--n_sequences", "4")
    with pytest.raises(SystemExit, match="add --joint"):
        run("evaluate", str(folder), "--each")
    with pytest.raises(SystemExit, match="no two layers of different MLPs"):
        run("evaluate", str(folder / "layer1-mxd-k2-seed0"), "--joint")


def test_train_any_architecture_then_evaluate(run, tmp_path):
    folder = tmp_path / "sae"
    arguments = f"--output {folder} --architectures batchtopk --k 3 --d_sae 24".split()
    printed = run("train", *arguments)
    (row,) = read_rows(folder / "results.json")
    assert row["hook_name"] == row["hook_name_out"] == "blocks.1.mlp.hook_out"
    assert f"{row['ce_replaced']:.4f}" in printed
    assert "found finished" in run("train", *arguments)
    run("evaluate", str(folder), "--n_sequences", "4")
    assert read_rows(folder / "results.json")[0]["ce_tokens"] < row["ce_tokens"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(COMMANDS[name][0].__doc__.split()) in shown
    assert f"Example: mxd-lens {name}" in shown


def test_there_are_few_options():
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = set()
    for command in commands.choices.values():
        command._preprocessing(args=[])  # adds the fields of its dataclass
        for action in command._actions:
            said = (action.help or "").partition(" (default")[0]
            options |= {(name, said) for name in action.option_strings if len(name) > 2}
    assert {"--model", "--strengths"} < {name for name, _ in options}
    assert len(options) <= 72


def test_export_then_convert(run, tmp_path):
    folder, out, back = tmp_path / "all", tmp_path / "out", tmp_path / "back"
    arguments = f"--output {folder} --layers all --expansion 8 --n_sequences 4 --k 2"
    run("train", *arguments.split(), "--architectures", "topk_transcoder", "mxd")
    export = ["export", str(folder), "--output", str(out)]
    with pytest.raises(SystemExit, match="several layers for one MLP"):
        run(*export)
    with pytest.raises(SystemExit, match="layer 0 is no transcoder but has architecture mxd"):
        run(*export, "--architecture", "mxd")
    assert run(*export, "--architecture", "topk_transcoder") == f"{out}\n"
    with pytest.raises(SystemExit, match="out holds something already: choose another folder"):
        run(*export, "--architecture", "topk_transcoder")
    printed = run("convert", str(out), "--output", str(back))
    assert printed.split() == [str(back / f"layer{number}") for number in range(3)]
    x = torch.randn(5, 16)
    for number in range(3):
        trained = folder / f"layer{number}-topk_transcoder-k2-seed0" / "layer"
        ours, theirs = (SAE.load_from_disk(path) for path in (trained, back / f"layer{number}"))
        assert torch.equal(ours(x), theirs(x))
        for name in ("model_name", "hook_name", "hook_name_out", "norms_folded"):
            assert ours.cfg.metadata[name] == theirs.cfg.metadata[name]
    with pytest.raises(SystemExit, match="back holds something already"):
        run("convert", str(out), "--output", str(back))
    with pytest.raises(SystemExit, match=r"there is no .*nowhere"):
        run("convert", str(tmp_path / "nowhere"), "--output", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_workers_that_cannot_be_started_are_a_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--output", str(tmp_path / "out"), "--workers", "2"]
    with pytest.raises(SystemExit, match=re.escape("pip install 'mxd-lens[workers]'")):
        run("compare", *arguments)
    with pytest.raises(SystemExit, match="--executor slurm needs sbatch"):
        run("compare", *arguments, "--executor", "slurm")
    with pytest.raises(SystemExit, match="name one of --layers, or keep --activations"):
        run("compare", *arguments, "--layers", "0", "1")
    assert not (tmp_path / "out").exists()


def test_a_flag_is_switched_off_by_its_value():
    def said(*arguments: str) -> bool:
        return make_parser().parse_args(["compare", *arguments]).cfg.streaming

    assert [said(), said("--streaming"), said("--streaming", "false")] == [False, True, False]


def test_a_prompt_is_traced_back_through_the_layers_of_a_folder(run, tmp_path):
    folder = tmp_path / "many"
    arguments = f"--output {folder} --layers 0 1 2 --expansion 8 --n_sequences 4 --k 2"
    run("train", *arguments.split(), "--architectures", "topk_transcoder", "mxd")
    asked = [str(folder), "--prompt", "the cat sat on"]
    printed = run("graph", *asked, "--architecture", "mxd", "--ablations", "5")
    (path,) = folder.glob("graph-the-cat-sat-on-*.json")
    graph = json.loads(path.read_text())
    assert graph["metadata"]["prompt"] == "the cat sat on"
    assert graph["metadata"]["prompt_tokens"] == ["<s>", "the", "cat", "sat", "on"]
    n_nodes, n_links = len(graph["nodes"]), len(graph["links"])
    assert f"s: {n_nodes} nodes, {n_links} edges" in printed and n_links > 0
    found = read(folder / path.name.replace("graph", "ablations"), Ablations)
    assert found is not None and len(found.rows) == 5
    assert f"original: {found.rank_correlation['original']:.2f}" in printed
    page = path.with_suffix(".html").read_text()
    assert "What follows “the cat sat on”" in page and "Single experts ablated" in page
    pair = ["--target", "mat", "--against", "dog"]
    run("graph", *asked, "--architecture", "topk_transcoder", *pair, "--max_nodes", "9")
    (other,) = {*folder.glob("graph-*.json")} - {path}
    logits = [node for node in json.loads(other.read_text())["nodes"] if node["layer"] == "4"]
    assert [node["clerp"].partition(" (p=")[0] for node in logits] == ['Output "mat - dog"']
    for wrong, why in {
        (): "several layers for one MLP",
        ("--architecture", "molt"): "has no layer of",
        ("--architecture", "mxd", "--target", "mat dog"): "'mat dog' is not one token but 2",
        ("--architecture", "mxd", "--against", "mat"): "needs a target",
    }.items():
        with pytest.raises(SystemExit, match=why):
            run("graph", *asked, *wrong)
    with pytest.raises(SystemExit, match="a prompt of 41 tokens: this model reads 1 to 32"):
        run("graph", str(folder), "--prompt", "cat " * 40, "--architecture", "mxd")


def test_a_rank_says_that_another_is_lost_before_it_parts_from_the_rest(monkeypatch, capsys):
    """To part may take longer than torchrun waits before it sends SIGTERM."""

    def lose(cfg):
        raise RuntimeError("Connection closed by peer")

    said = []
    monkeypatch.setitem(COMMANDS, "demo", (COMMANDS["demo"][0], lose))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("mxd_lens.cli.leave", lambda: said.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as left:
        main(["demo"])
    assert left.value.code == 1
    assert "another rank has ended" in said[0] and "the same command goes on" in said[0]
