"""Text that was tokenized before, from SAELens' tool to results."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Sequence, Value, load_from_disk
from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig
from transformers import AutoTokenizer

from mxd_lens import load_text, split_documents, train
from mxd_lens.analysis.experts.corpus import read_corpus
from mxd_lens.cli import main
from mxd_lens.data.activations import activations_store
from mxd_lens.data.stream import Part, Stream
from mxd_lens.data.tokens import token_batches
from mxd_lens.models.site import Site
from mxd_lens.runs.fingerprint import text_fingerprint
from mxd_lens.startup import Interrupted
from tests.conftest import N_VOCAB

from ..helpers import STORE, open_reader, same

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.fixture
def pretokenize(text, llama_folder, tmp_path):
    """``pretokenize(**options)``: the folder of the documents' tokens, in the documents' order."""

    def make(**options: Any) -> str:
        config: dict[str, Any] = {"tokenizer_name": str(llama_folder), "dataset_path": "json"}
        config |= {"data_files": [text], "context_size": 8, "num_proc": 1, "shuffle": False}
        config |= {"save_path": str(tmp_path / "tokens")} | options
        PretokenizeRunner(PretokenizeRunnerConfig(**config)).run()
        return config["save_path"]

    return make


def rows(n: int = 60, n_pos: int = 8, **first: int) -> Dataset:
    ids = np.random.default_rng(0).integers(3, N_VOCAB, (n, n_pos))
    ids[:, 0] = first.get("first", 1)
    return Dataset.from_dict({"input_ids": ids.tolist()})


@pytest.fixture
def site(tiny_bridge) -> Site:
    return Site.at(tiny_bridge, 1)


def test_the_lines_of_the_documentation(text, llama_folder, tmp_path, monkeypatch):
    (lines,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "my_text.jsonl")
    for said, here in (
        ('"gpt2"', repr(str(llama_folder))),
        ("context_size=128", "context_size=8"),
        ("num_proc=4", "num_proc=1"),
    ):
        assert said in lines
        lines = lines.replace(said, here)
    exec(lines, {})
    ids = np.concatenate([*token_batches(load_text("my_tokens"))])
    assert ids.shape[0] > 400 and ids.shape[1] == 8 and (ids[:, 0] == 1).all()


def test_the_model_reads_the_sequences_that_it_would_have_made(pretokenize, site, documents):
    before = load_text(pretokenize(pretokenize_batch_size=None))
    of_tokens, of_text = (activations_store([site], rows, **STORE) for rows in (before, documents))
    expected = [*of_text._iterate_tokenized_sequences()]
    same(torch.stack([*of_tokens._iterate_tokenized_sequences()]), torch.stack(expected))
    assert len(expected) > 400


def test_batches_are_the_same_from_a_folder_streamed_or_in_memory(pretokenize, site):
    folder = pretokenize()
    raw = load_from_disk(folder)
    every = [raw, load_text(folder), load_text(folder, streaming=True)]
    batches = []
    for dataset in every:
        stream = Stream(open_reader([site], dataset), [Part(1, 0)])
        batches.append(torch.stack([batch[Part(1, 0)] for batch in islice(stream, 20)]))
    for other in batches[1:]:
        same(other, batches[0])
    assert raw.format["type"] == "torch"  # nothing was done to it


def test_a_smaller_context_reads_the_beginnings(site):
    with pytest.warns(RuntimeWarning, match="Some data will be discarded"):
        store = activations_store([site], rows(), **STORE | {"context_size": 5})
    expected = torch.tensor(rows()["input_ids"])[:, :5]
    same(torch.stack([*store._iterate_tokenized_sequences()]), expected)


@pytest.mark.parametrize(
    "column", ["input_ids", "tokens", "ids", "text"], ids=lambda name: f"column {name}"
)
@pytest.mark.parametrize("kind", [Sequence(Value("int32")), Sequence(Value("int64"), length=8)])
def test_columns_of_tokens_by_any_name(tmp_path, column, kind):
    features = Features({column: kind, "n": Value("int64")})
    dataset = Dataset.from_dict({column: rows()["input_ids"], "n": range(60)}, features)
    DatasetDict({"train": dataset, "test": dataset.select(range(9))}).save_to_disk(tmp_path / "a")
    dataset.to_parquet(tmp_path / "a.parquet")
    name = {"text_column": column} if column == "ids" else {}
    for source, split in (("a", "train"), ("a.parquet", "train"), ("a", "test")):
        loaded = load_text(str(tmp_path / source), split, **name)
        assert loaded.column_names == ["input_ids"]
        assert loaded[:] == rows()[: len(loaded)]
    with pytest.raises(ValueError, match=r"cannot load .*a': it has no split 'x', but 'train', 't"):
        load_text(str(tmp_path / "a"), "x", **name)


def test_a_folder_of_saved_text(documents, tmp_path):
    documents.save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        loaded = load_text(str(tmp_path / "saved"), streaming=streaming)
        assert [row["text"] for row in loaded] == documents["text"]


@pytest.mark.parametrize("streaming", [False, True])
def test_no_sequence_is_in_both_halves(streaming):
    dataset = rows(100).select([*range(100), *range(20)])
    if streaming:
        dataset = rows(100).to_iterable_dataset()
    train, held = (
        {tuple(row["input_ids"]) for row in part} for part in split_documents(dataset, 30)
    )
    assert held and not train & held
    assert train | held == {tuple(row) for row in rows(100)["input_ids"]}
    with pytest.raises(ValueError, match="2 documents to hold out are all among those to trai"):
        split_documents(rows(1).select([0] * 9), 2)


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (rows(n_pos=7), "context_size=8: the text was tokenized into sequences of 7, ask"),
        (rows(first=5), "each sequence must begin with the BOS token, 1, as those do"),
        (
            Dataset.from_dict({"input_ids": [[1, *range(17, 24), 24]] * 9}),
            "for another model: this one has 24 tokens, and none with id 24",
        ),
        (Dataset.from_dict({"input_ids": [[1, -1] * 4] * 9}), "and none with id -1"),
        (
            Dataset.from_dict({"input_ids": [[1] * 8] * 1000 + [[1] * 9]}),
            "equally long, and there are some of 8 and some of 9: tokenize",
        ),
        (Dataset.from_dict({"input_ids": [[1] * 8, None]}), "some of 0 and some of 8"),
        (Dataset.from_dict({"input_ids": [[1, None] * 4]}), "an id in every place"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_that_the_model_cannot_read(site, dataset, why, streaming):
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(ValueError, match=why):
        activations_store([site], dataset, **STORE)


@pytest.mark.parametrize("streaming", [False, True])
class TestTokenizer:
    @pytest.fixture
    def load(self, pretokenize, edit_json, streaming):
        """``load(**fields)``: the tokens, with these fields in what SAELens has written down."""

        def load(**fields: Any) -> Any:
            folder = Path(pretokenize())
            edit_json(folder / "sae_lens.json", **fields)
            return load_text(str(folder), streaming=streaming)

        return load

    def test_of_the_model_is_known_by_its_tokens(self, load, site, gpt2_folder):
        dataset = load(tokenizer_name=str(gpt2_folder))
        for part in split_documents(dataset, 40):
            activations_store([site], part, **STORE)

    def test_of_another_model(self, load, site, llama_folder, tmp_path):
        other = AutoTokenizer.from_pretrained(llama_folder)
        state = json.loads(other.backend_tokenizer.to_str())
        state["model"]["vocab"] = {**state["model"]["vocab"], "cat": 900}
        other.save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(state))
        for part in split_documents(load(tokenizer_name=str(tmp_path / "other")), 40):
            with pytest.raises(ValueError, match=r"by '.*other', whose tokens are not those of"):
                activations_store([site], part, **STORE)
            with pytest.raises(ValueError, match=r"by '.*other', whose tokens are not those of"):
                read_corpus(site, part, 100, 8)

    def test_that_is_not_here(self, load, site, tmp_path):
        with pytest.warns(UserWarning, match=r"tokenized by '.*none', which is not here"):
            activations_store([site], load(tokenizer_name=str(tmp_path / "none")), **STORE)


def test_what_saelens_writes_is_damaged(pretokenize):
    folder = pretokenize()
    (Path(folder) / "sae_lens.json").write_text("{")
    with pytest.raises(ValueError, match=f"cannot load '{folder}': Expecting property name"):
        load_text(folder)


def test_fingerprints_tell_sequences_apart_however_they_are_stored():
    dataset = rows()
    before = text_fingerprint(dataset)
    narrow = dataset.cast(Features({"input_ids": Sequence(Value("int32"))}))
    assert text_fingerprint(narrow.with_format("torch")) == before
    assert text_fingerprint(dataset.select(range(59))) != before
    assert text_fingerprint(dataset.shuffle(seed=1)) != before
    streamed = dataset.to_iterable_dataset()
    assert text_fingerprint(streamed) == text_fingerprint(streamed)


def test_each_sequence_is_a_text_for_experts(site):
    dataset = rows(30).select([*range(30), 0, 1])
    corpus = read_corpus(site, dataset, 10_000, 6)
    same(torch.stack(corpus.tokens), torch.tensor(rows(30)["input_ids"])[:, :6])
    assert corpus.ids.tolist() == [i for row in rows(30)["input_ids"] for i in row[1:6]]
    with pytest.raises(ValueError, match="must begin with the BOS token"):
        read_corpus(site, rows(first=4), 100, 8)


@pytest.mark.usefixtures("offline")
def test_every_stage(pretokenize, llama_folder, labelled, tmp_path, capsys):
    tokens, run = pretokenize(shuffle=True, seed=0), str(tmp_path / "run")
    common = f"--model {llama_folder} --dataset {tokens} --layers 1 --k 3 --d_sae 12"
    common += " --training_tokens 1280 --batch_size 32 --context_size 8 --lm_batch_size 4"
    common += " --heldout_documents 100 --n_sequences 4 --device cpu"
    main(f"train {common} --output {run}".split())
    main(f"train {common} --output {run}".split())
    assert "found finished" in capsys.readouterr().out
    main(f"evaluate {run} --n_sequences 4".split())
    main(f"evaluate {run} --dataset {tokens} --n_sequences 4".split())
    main(f"probe {run} --data {labelled} --n_texts 40 --n_splits 1".split())
    main(f"experts {run} --n_tokens 500 --sample_tokens 3".split())
    main(f"steer {run} --n_experts 2 --n_samples 2 --sample_tokens 3 --strengths 1".split())
    main(["report", run])
    main(f"compare {common} --output {tmp_path / 'compare'}".split())
    other = f"{tmp_path / 'compare'} --dataset {tokens}"
    main(f"experts {other} --n_tokens 500 --effect_strength 0 --sample_strength 0".split())
    main(f"evaluate {other} --n_sequences 4".split())
    row = json.loads(Path(run, "results.json").read_text())
    assert 0 < row["ce_original"] < 10 and row["ce_tokens"] <= 16 * 7
    pretokenize(shuffle=True, seed=1)
    with pytest.raises(SystemExit, match="was begun with another text than"):
        main(f"train {common} --output {run}".split())


def test_a_run_on_tokens_resumes(tiny_bridge, make_config, at_step):
    dataset = rows(400)
    whole = train(make_config(), tiny_bridge, dataset)
    cfg = make_config(output=make_config().output + "-stopped")
    with at_step(17, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(Interrupted):
        train(cfg, tiny_bridge, dataset)
    with pytest.raises(ValueError, match="begun with another text"):
        train(cfg, tiny_bridge, dataset.shuffle(seed=1))
    for name, weights in train(cfg, tiny_bridge, dataset).state_dict().items():
        same(weights, whole.state_dict()[name])
