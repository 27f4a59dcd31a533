"""Results on disk: JSON that is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a file says; None if there is none.

    Raises:
        ValueError: it is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a file, under its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    unfinished.replace(path)
