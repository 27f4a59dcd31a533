"""The commands, on a tiny model saved on disk and a local text file."""

import json

import pytest

from mxd_lens.cli import COMMANDS, main


@pytest.fixture
def run(llama_folder, documents, tmp_path, one_thread, capsys):
    """``run(command, *arguments)``: what it printed."""
    text = tmp_path / "text.jsonl"
    documents.to_json(text)
    common = ["--model", str(llama_folder), "--layer", "1", "--dataset", str(text)]
    common += ["--training_tokens", "640", "--batch_size", "32", "--context_size", "8"]
    common += ["--lm_batch_size", "4", "--heldout_documents", "40", "--device", "cpu"]

    def run(command: str, *arguments: str) -> str:
        main([command, *(common if command in ("train", "compare") else []), *arguments])
        return capsys.readouterr().out

    return run


def test_compare_then_evaluate_all_on_other_text(run, tmp_path):
    folder = tmp_path / "frontier"
    arguments = ["--output", str(folder), "--expansion", "8", "--n_sequences", "4"]
    arguments += ["--k", "2", "3", "--architectures", "topk_transcoder", "topk"]
    table = run("compare", *arguments)
    rows = json.loads((folder / "results.json").read_text())
    assert [(row["architecture"], row["k"]) for row in rows] == [
        ("topk_transcoder", 2),
        ("topk_transcoder", 3),
        ("topk", 2),
        ("topk", 3),
    ]
    assert all(f"| {row['ce_increase']:.4f} |" in table for row in rows)
    page = (folder / "results.html").read_text()
    assert all(f"<td>{row['ce_increase']:.4f}</td>" in page for row in rows)

    one = folder / "topk-k2-seed0" / "results.json"
    measured = json.loads(one.read_text())
    run("evaluate", str(one.parent), "--n_sequences", "4")
    assert json.loads(one.read_text()) == measured

    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["the dog saw a cat on the mat after the fish"] * 200))
    table = run("evaluate", str(folder), "--dataset", str(other), "--n_sequences", "4")
    (found,) = folder.glob("results-other-*.json")
    again = json.loads(found.read_text())
    assert [row["k"] for row in again] == [row["k"] for row in rows]
    assert all(row["dataset"] == str(other) for row in again)
    assert all(a["ce_original"] != b["ce_original"] for a, b in zip(again, rows, strict=True))
    assert found.with_suffix(".html").exists()
    with pytest.raises(SystemExit, match="say on which --dataset"):
        run("evaluate", str(folder))


def test_train_any_architecture_then_evaluate(run, tmp_path):
    folder = tmp_path / "sae"
    arguments = [
        "--output",
        str(folder),
        "--architecture",
        "batchtopk",
        "--k",
        "3",
        "--d_sae",
        "24",
    ]
    printed = run("train", *arguments)
    row = json.loads((folder / "results.json").read_text())
    assert row["hook_name"] == row["hook_name_out"] == "blocks.1.mlp.hook_out"
    assert f"{row['ce_replaced']:.4f}" in printed
    assert "found finished" in run("train", *arguments)
    run("evaluate", str(folder), "--n_sequences", "4")
    assert json.loads((folder / "results.json").read_text())["ce_tokens"] < row["ce_tokens"]


def test_every_command_explains_itself(capsys):
    for name, (_, _, description, example) in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert description in shown and example in shown
