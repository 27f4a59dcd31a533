"""Uploading to a hub of our own and loading from it, with the real client."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

import mxd_lens
from mxd_lens.cli import main
from mxd_lens.data.text import DEMO_TEXTS
from mxd_lens.demo.models import DEMO_MODELS
from mxd_lens.hub import DEMO_SOURCES, gather, source
from mxd_lens.layers import answers
from mxd_lens.runs.results import read_rows
from tests.conftest import WORDS
from tests.fake_hub import FakeHub, fake_hub

PROJECT = Path(__file__).parents[2]
MXD, DENSE = "layer1-mxd-k2-seed0", "layer1-dense-seed0"


@pytest.fixture(scope="module")
def folder(llama_folder, tmp_path_factory, offline) -> Path:
    """A comparison whose MxD's experts were inspected, with what is none of the hub's business."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder.parent / "my-text.txt"
    rng = random.Random(0)
    text.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=20)) for _ in range(200)))
    common = f"--model {llama_folder} --layers 1 --dataset {text} --training_tokens 640 "
    common += "--batch_size 32 --context_size 8 --lm_batch_size 4 --heldout_documents 40 --k 2 "
    common += f"--device cpu --output {folder} --expansion 8 --n_sequences 4"
    main(["compare", *common.split(), "--architectures", "mxd", "dense"])
    experts = ["--n_tokens", "400", "--sample_strength", "0"]
    main(["experts", str(folder / MXD), *experts])
    (folder / MXD / "secret.pkl").write_bytes(b"pickle")
    (folder / MXD / "layer" / "optimizer.pt").write_bytes(b"pickle")
    (folder / "notes.json").write_text("{}")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    """A hub at which we are ``me``, for the processes that a test starts; this one's client has
    read its endpoint already."""
    with fake_hub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writes", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """``refused(*arguments)``: the sentence with which the command ends."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["push", *arguments])
        assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
        return ended.value.code

    return run


def python(*arguments: str, stdin: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=PROJECT, stdin=stdin, capture_output=True, text=True)


EACH = """
import json, os, sys
import mxd_lens.cli

said = []
for environment, call in json.loads(sys.argv[1]):
    os.environ.update(environment)
    try:
        exec(call)
        said.append("")
    except (SystemExit, ValueError) as error:
        said.append(str(error))
print(json.dumps(said))
"""


def each(*calls: tuple[dict[str, str], str]) -> list[str]:
    """What some calls are refused with, in one process of their own."""
    done = python("-c", EACH, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def push(*arguments: object) -> str:
    return f"mxd_lens.cli.main({['push', *map(str, arguments), '--yes']})"


LOADED = """
import sys
import torch
import mxd_lens
from sae_lens import SAE

model, folder, repo, *names = sys.argv[1:]
tokens = torch.randint(3, 20, (4, 8), generator=torch.Generator().manual_seed(0))

def logits(layer):
    lm = mxd_lens.load_model(model)
    with mxd_lens.splice(lm, {1: layer}):
        return lm(tokens).numpy(force=True).tobytes()

for name in names:
    expected = logits(SAE.load_from_disk(f"{folder}/{name}/layer"))
    assert logits(SAE.from_pretrained(repo, name)) == expected
    assert logits(mxd_lens.load(repo, name)) == expected
    assert logits(torch.nn.Identity()) != expected
print("equal")
"""


def test_push_and_load_with_the_real_client(hub, folder, llama_folder):
    pushed = python("-m", "mxd_lens", "push", str(folder), "me/tiny-mxd", "--yes")
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/me/tiny-mxd" in pushed.stdout
    files = hub.repos["me/tiny-mxd"]
    layer = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json"}
    assert files.keys() == {
        *{"README.md", "results.json", "results.html"},
        *(f"{name}/{file}" for name in (MXD, DENSE) for file in layer | {"results.json"}),
        *(f"{MXD}/{file}" for file in ("experts.json", "report.html")),
    }
    for name in (MXD, DENSE):
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert files[f"{name}/{file}"] == (folder / name / "layer" / file).read_bytes()
    assert all(path in pushed.stdout for path in files)
    assert [paths for *_, paths in hub.commits[-1:]] == [
        [path for path in hub.commits[-1][2] if "safetensors" not in path]
    ]

    sent = len(hub.commits)
    assert each(({}, push(folder, "me/tiny-mxd"))) == [""]
    assert {path for *_, paths in hub.commits[sent:] for path in paths} <= {"README.md"}
    loaded = python("-c", LOADED, str(llama_folder), str(folder), "me/tiny-mxd", MXD, DENSE)
    assert loaded.stdout.endswith("equal\n"), loaded.stderr
    bare = f"from sae_lens import SAE; SAE.from_pretrained('me/tiny-mxd', '{MXD}')"
    assert "KeyError: 'mxd'" in python("-c", bare).stderr


def test_what_the_card_says(hub, folder, llama_folder):
    upload = gather(folder, "me/tiny-mxd")
    card = ModelCard(upload.card)
    assert card.data.library_name == "saelens"
    assert {"mxd-lens", "mixture-of-decoders", "mxd", "dense"} <= {*card.data.tags}
    assert card.data.base_model is None  # a local folder
    assert yaml.safe_load(upload.card.split("---\n")[1]) == card.data.to_dict()
    text = card.text
    mxd_lr, dense_lr = (answers(name).default_lr for name in ("mxd", "dense"))
    for said in (
        "pip install mxd-lens",
        "import mxd_lens  # first",
        f'SAE.from_pretrained("me/tiny-mxd", "{MXD}")',
        f'mxd_lens.load("me/tiny-mxd",\n"{MXD}")',
        "| dense control |",
        f"/me/tiny-mxd/resolve/main/{MXD}/report.html",
        f"`{llama_folder.name}` (a local one): not known to mxd-lens",
        "| tokens | 640 |",
        f"| peak learning rate | {mxd_lr:g} (MxD), {dense_lr:g} (dense control) |",
    ):
        assert said in text, said
    for row in read_rows(folder / "results.json"):
        assert f"{row['ce_increase']:.4f}" in text
    assert str(llama_folder) not in text and str(folder.parent) not in text
    assert "not measured:" not in text
    assert any(str(llama_folder) in note for note in upload.notes)


def test_a_card_says_what_was_not_measured(hub, folder, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(folder / MXD, alone)
    for name in ("results.json", "experts.json", "report.html"):
        (alone / name).unlink(missing_ok=True)
    upload = gather(alone, "me/one")
    assert list(upload.layers) == [MXD]
    assert (
        "Nothing yet: whoever uploaded these layers has not run `mxd-lens evaluate`" in upload.card
    )
    shutil.copy(folder / MXD / "results.json", alone)
    card = gather(alone, "me/one").card
    assert "**worth**: not measured: it needs the dense control" in card
    assert "**agreement**: not measured: experts were not inspected" in card
    assert "There is no dense control here." in card


def test_a_card_links_the_model_and_the_text(hub, folder, edit_json, tmp_path):
    shutil.copytree(folder / MXD, tmp_path / "run")
    where = {"model": "big/model", "dataset": "big/text:small"}
    edit_json(tmp_path / "run" / "runner_cfg.json", **where)
    hub.licences = {"big/model": "apache-2.0", "big/text": "odc-by"}
    card = ModelCard(gather(tmp_path / "run", "me/one").card)
    assert card.data.base_model == "big/model" and card.data.datasets == "big/text"
    assert f"[big/model]({hub.url}/big/model): apache-2.0" in card.text
    assert f"[big/text, small]({hub.url}/datasets/big/text): odc-by; pages and" in card.text
    assert 'mxd_lens.load_model("big/model")' in card.text


def test_licences_are_asked_for(hub):
    hub.licences = {"big/model": "apache-2.0", "big/text": "odc-by"}
    assert source("model", "big/model").licence == "apache-2.0"
    text = source("dataset", "big/text:small")
    assert text.licence == "odc-by" and text.url == f"{hub.url}/datasets/big/text"
    assert source("model", "nobodys/model").licence == "see its page"
    assert {*DEMO_TEXTS, *DEMO_MODELS} == {*DEMO_SOURCES}
    assert source("dataset", "demo:wikipedia").licence.startswith("CC BY-SA")


def test_nothing_is_uploaded_without_a_yes(hub, folder, refused, monkeypatch, capsys):
    assert "say --yes where nobody can be asked" in refused(str(folder), "me/asked")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        for answer in ("n", ""):
            patch.setattr("builtins.input", lambda _, answer=answer: answer)
            assert refused(str(folder), "me/asked").endswith("nothing was uploaded")
    shown = capsys.readouterr().out
    assert f"{MXD}/sae_weights.safetensors" in shown and " kB" in shown
    assert "README.md that is there is replaced" in shown and "quote the text" in shown
    assert not hub.repos

    ours, theirs = pty.openpty()
    os.write(ours, b"y\n")
    pushed = python("-m", "mxd_lens", "push", str(folder), "me/asked", stdin=theirs)
    assert pushed.returncode == 0 and "Upload? [y/N]" in pushed.stdout, pushed.stderr
    assert f"{MXD}/sae_weights.safetensors" in hub.repos["me/asked"]


def test_refusals_are_a_sentence(hub, folder, refused, monkeypatch, tmp_path):
    may_not, others, nobody, unknown = each(
        ({"HF_TOKEN": "hf_reads"}, push(folder, "me/tiny")),
        ({"HF_TOKEN": "hf_writes"}, push(folder, "others/tiny")),
        ({"HF_TOKEN": "hf_of_nobody"}, push(folder, "me/tiny")),
        ({"HF_TOKEN": ""}, push(folder, "me/tiny")),
    )
    assert "your token may not write to me/tiny (" in may_not
    assert f"{hub.url}/settings/tokens, or name a repository of yours" in others
    assert f"{hub.url} does not accept your token: run `hf auth login`" in nobody
    assert f"you are not logged in at {hub.url}: run `hf auth login`" in unknown

    yes = (str(folder), "me/tiny", "--yes")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert f"HF_HUB_OFFLINE is set, unset it to reach {hub.url}" in refused(*yes)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "cannot reach http://127.0.0.1:9" in refused(*yes)
    assert "neither a finished run nor a comparison" in refused(str(tmp_path), "me/tiny", "--yes")
    for name in ("tiny", "a/b/c", "me/--x"):
        assert "repo=" in refused(str(folder), name, "--yes")
    assert not hub.repos and not hub.commits


def test_a_file_that_is_none_of_ours_is_refused(hub, folder, refused, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "results-mine.json").write_text('{"password": 1}')
    assert "results-mine.json" in refused(str(copy), "me/tiny", "--yes")


def test_loading_says_what_is_wrong(hub, folder, monkeypatch):
    cfg = (folder / MXD / "layer" / "cfg.json").read_bytes()
    weights = (folder / MXD / "layer" / "sae_weights.safetensors").read_bytes()
    files = {"cfg.json": cfg, "sae_weights.safetensors": weights}
    hub.repos["me/tiny"] = {f"{MXD}/{name}": content for name, content in files.items()}
    files["cfg.json"] = cfg.replace(b'"mxd"', b'"mxd_of_2030"')
    hub.repos["me/new"] = {f"{MXD}/{name}": content for name, content in files.items()}
    none, no_layer, not_known = each(
        ({}, f"mxd_lens.load('me/none', '{MXD}')"),
        ({}, "mxd_lens.load('me/tiny', 'layer2')"),
        ({}, f"mxd_lens.load('me/new', '{MXD}')"),
    )
    assert f"{hub.url} has no me/none, or hides it from you: check its name" in none
    assert no_layer == f"me/tiny has no layer 'layer2'; it has {MXD}"
    assert "of an architecture, 'mxd_of_2030', that mxd-lens" in not_known
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="me/other: HF_HUB_OFFLINE is set, unset it"):
        mxd_lens.load("me/other", MXD)
