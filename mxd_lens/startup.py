"""Before the imports that take seconds: installed versions, signals while they last, progress."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partialmethod
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from tqdm import tqdm

KNOWN_WRONG = [
    (
        "transformers",
        ">=5.24",  # renames attention's past_key_values, which TransformerBridge 3.9 looks for
        "with it a TransformerBridge generates without its KV cache, and so without the text",
    ),
]
"""Package, versions, and what is wrong with them."""

PROGRESS_INTERVAL = 30
"""Seconds between two lines of a progress bar where stderr is not a terminal."""


class Interrupted(KeyboardInterrupt):
    """A signal came; what was finished is on disk."""

    def __init__(self, said: str, number: int = signal.SIGINT):
        super().__init__(said)
        self.number = number


def prepare() -> None:
    """Set up signals and progress where the command is what imports this; see `check_versions`."""
    command = Path(sys.argv[0]).name == "mxd-lens" or _is_module()
    if command:
        leave_on_signals()
        if int(os.environ.get("RANK", 0)):  # under torchrun the first rank speaks for all
            silent: Any = partialmethod(tqdm.__init__, disable=True)
            tqdm.__init__ = silent
        if not os.isatty(2):
            progress_in_lines()
    try:
        check_versions()
    except ImportError as error:
        if command:
            sys.exit(f"mxd-lens: {error}")
        raise


def _is_module() -> bool:
    """True in ``python -m mxd_lens``, and not in a ``python -m`` of another's that imports it."""
    if sys.argv[0] != "-m" or "-m" not in sys.orig_argv:
        return False
    return sys.orig_argv[sys.orig_argv.index("-m") + 1] in ("mxd_lens", "mxd_lens.cli")


def check_versions() -> None:
    """Raise ImportError if one of `KNOWN_WRONG` is installed."""
    for package, versions, why in KNOWN_WRONG:
        installed = metadata.version(package)
        if SpecifierSet(versions).contains(installed, prereleases=True):
            allowed = versions.replace(">=", "<")
            raise ImportError(
                f"{package} {installed} is installed, and {why}: "
                f"run `{sys.executable} -m pip install '{package}{allowed}'`"
            )


def leave_on_signals() -> None:
    """End the process at once: nothing has been begun, or everything is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


def progress_in_lines() -> None:
    """Print each progress bar, other libraries' too, as a line now and then and when it is done."""
    tqdm.display = _print_line


def _print_line(self: Any, msg: str | None = None, pos: int | None = None) -> None:
    """Show a bar, as tqdm calls it; it ends the last line itself, and wipes out with ``msg=""``."""
    now, closing = time.monotonic(), self.disable
    last = vars(self).setdefault("last_line", now)
    if msg is None and (closing or now - last >= PROGRESS_INTERVAL):
        self.last_line = now
        self.fp.write(f"{self}" if closing else f"{self}\n")


@contextmanager
def handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """These handlers of signals within the block, if it is in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_on_signals() -> AbstractContextManager[None]:
    """Raise, so that what has been begun is left whole; SIGTERM like Ctrl-C."""
    return handling({signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _raise})


def _leave(number: int, _: Any) -> None:
    os.write(2, b"\nmxd-lens: interrupted\n")
    os._exit(128 + number)


def _raise(number: int, _: Any) -> None:
    raise Interrupted("terminated; the same command goes on with what is not finished", number)
