import json

import pytest
from datasets import Dataset

from mxd_lens.data.text import load_text, split_documents


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_reads_local_files_one_document_a_row(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", [{"body": "one", "id": 1}, {"body": "two", "id": 2}])
    assert load_text(jsonl, text_column="body")["text"] == ["one", "two"]
    text = tmp_path / "a.txt"
    text.write_text("first line\nsame document\n\nsecond document\n")
    assert [t.strip() for t in load_text(str(text))["text"]] == [
        "first line\nsame document",
        "second document",
    ]
    parquet = tmp_path / "a.parquet"
    Dataset.from_dict({"text": ["x", "y"]}).to_parquet(parquet)
    assert load_text(str(parquet))["text"] == ["x", "y"]
    assert [row["text"] for row in load_text(str(parquet), streaming=True)] == ["x", "y"]


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "one", "id": 1}])
    with pytest.raises(ValueError, match=r"no column 'text'; it has 'body', 'id'"):
        load_text(path)
    with pytest.raises(ValueError, match=r"column 'id' .* holds no text"):
        load_text(path, text_column="id")


def test_text_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_text(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_never_in_both_halves(streaming):
    texts = [f"document {i}" for i in range(50)] + ["repeated"] * 10
    dataset = Dataset.from_dict({"text": texts})
    if streaming:
        dataset = Dataset.from_dict({"text": texts[:50]}).to_iterable_dataset()
    train, held = split_documents(dataset, 20, seed=1)
    train, held = ([row["text"] for row in part] for part in (train, held))
    assert held and not set(train) & set(held)
    assert set(train) | set(held) == {row["text"] for row in dataset}


def test_the_split_shuffles_sorted_documents_and_is_repeatable():
    dataset = Dataset.from_dict({"text": [f"{i:03}" for i in range(100)]})
    held = split_documents(dataset, 20)[1]["text"]
    assert held == split_documents(dataset, 20)[1]["text"] != sorted(held)
