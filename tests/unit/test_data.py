"""Text and labelled text, from files."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from mxd_lens.data.labelled import load_labelled
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_an_empty_file_or_none(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name}.* is empty"):
        load_text(str(tmp_path / name))
    with pytest.raises(ValueError, match="there is no file"):
        load_text(str(tmp_path / f"no-{name}"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 \xff", "'utf-8' codec can't decode byte 0xe9"),
        ("a.csv", b"text\ncaf\xe9\n", "[uU][tT][fF]-?8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "Invalid UTF8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "Trailing data"),
        ("a.csv", b'text\n"a"\n1,2,3\n', "Expected 1 fields in line 3, saw 3"),
    ],
)
def test_a_broken_file_and_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot load '.*{name}': .*{message}"):
        load_text(str(tmp_path / name))


def test_documents_that_are_all_the_same():
    with pytest.raises(ValueError, match="2 documents to hold out are all among those to trai"):
        split_documents(Dataset.from_dict({"text": ["the cat"] * 9}), 2)


def test_nothing_to_hold_out(documents):
    with pytest.raises(ValueError, match="n_heldout=0: must be at least 1"):
        split_documents(documents, 0)


# Labelled texts

COLUMNS = {"text_column": "body", "label_column": "stars"}


def reviews(n=20):
    return Dataset.from_dict(
        {
            "body": [f"good {i}" for i in range(n)] + [f"bad {i}" for i in range(2 * n)],
            "stars": [1] * n + [0] * 2 * n,
        }
    )


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_local_files_are_read_as_many_texts_of_each_class(tmp_path, ending):
    path = str(tmp_path / f"a.{ending}".replace("json", "jsonl"))
    getattr(reviews(), f"to_{ending}")(path)
    data = load_labelled(path, n_texts=31, seed=3, **COLUMNS)
    assert data.column_names == ["text", "label"]
    assert sorted(data["label"]) == ["0"] * 15 + ["1"] * 15
    assert len(set(data["text"])) == 30
    for row in data:
        assert row["text"].startswith("good" if row["label"] == "1" else "bad")
    assert data["label"][:15] != data["label"][15:] != sorted(data["label"])[15:]
    assert data[:] == load_labelled(path, n_texts=31, seed=3, **COLUMNS)[:]
    assert data[:] != load_labelled(path, n_texts=31, seed=4, **COLUMNS)[:]


def test_classes_have_their_names(tmp_path):
    names = ClassLabel(names=["bad", "good"])
    data = reviews().cast(Features({"body": Value("string"), "stars": names}))
    data.to_parquet(tmp_path / "a.parquet")
    loaded = load_labelled(str(tmp_path / "a.parquet"), n_texts=40, **COLUMNS)
    assert all(text.startswith(label) for text, label in zip(*loaded[:].values(), strict=True))


def test_no_text_is_taken_twice_nor_an_empty_or_unlabelled_one(tmp_path):
    good = [f"good {i}" for i in range(5)] * 9
    bad = [f"bad {i}" for i in range(5)] + [" "] * 40 + ["neither"]
    label = ["good"] * 45 + ["bad"] * 45 + [None]
    path = str(tmp_path / "a.parquet")
    Dataset.from_dict({"text": good + bad, "label": label}).to_parquet(path)
    data = load_labelled(path, n_texts=10)
    assert sorted(data["text"]) == sorted({*good, *bad} - {" ", "neither"})
    with pytest.raises(ValueError, match=r"only 5 different texts of class .* at most 10"):
        load_labelled(path, n_texts=12)


def test_labelled_texts_that_cannot_be_loaded(tmp_path):
    reviews().to_json(tmp_path / "a.jsonl")
    texts = [str(i) for i in range(9)]
    for name, labels in {
        "one": ["x"] * 9,
        "lists": [["a", "b"]] * 9,
        "objects": [{"a": 1}] * 9,
    }.items():
        Dataset.from_dict({"text": texts, "label": labels}).to_json(tmp_path / f"{name}.jsonl")
    body = {"text_column": "body", "label_column": "body"}
    for name, options, message in [
        ("a", {}, r"no column 'text'; it has 'body', 'stars'"),
        ("a", body | {"label_column": "topic"}, r"no column 'topic'; it has 'body', 'stars'"),
        ("a", body | {"text_column": "stars"}, r"column 'stars' of .* holds no text"),
        ("a", body, "n_texts=100 are too few for the 60 classes"),
        ("one", {}, r"fewer than 2 classes: \['x'\]"),
        ("one", {"label_column": "text"}, "has only 1 different texts of class '0'"),
        ("lists", {}, r"column 'label' of .* holds no labels, but"),
        ("objects", {}, r"column 'label' of .* holds no labels, but"),
        ("none", {}, "there is no file"),
    ]:
        n_texts = 2400 if "holds no text" in message else 100
        with pytest.raises(ValueError, match=message):
            load_labelled(str(tmp_path / f"{name}.jsonl"), n_texts=n_texts, **options)
