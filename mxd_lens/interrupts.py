"""Ctrl-C and SIGTERM, for the ``mxd-lens`` command: a sentence, never a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal came; what was finished is on disk."""

    def __init__(self, said: str, number: int = signal.SIGINT):
        super().__init__(said)
        self.number = number


def while_importing() -> None:
    """Leave at once while the command is being imported, which takes seconds.

    Nothing happens in a process that is another's than the command's.
    """
    if Path(sys.argv[0]).name in ("mxd-lens", "-m"):
        _handle(_leave, _leave)


def while_working() -> None:
    """Raise, so that what has been begun is left whole; SIGTERM like Ctrl-C."""
    _handle(signal.default_int_handler, _raise)


def _handle(on_interrupt: Any, on_terminate: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_terminate)


def _leave(number: int, _: Any) -> None:
    os.write(2, b"\nmxd-lens: interrupted\n")
    os._exit(128 + number)


def _raise(number: int, _: Any) -> None:
    raise Interrupted("terminated; the same command goes on with what is not finished", number)
