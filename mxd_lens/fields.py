"""What fields of configurations and arguments may hold: a bad value is one sentence, at once."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterable, Sequence
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import numpy as np
import simple_parsing
import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from simple_parsing.helpers.custom_actions import BooleanOptionalAction
from typing_extensions import dataclass_transform

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


def _usable(device: str) -> str:
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has kinds of its own
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"this machine has no such device to compute on, but it has cpu ({why})"
        ) from error
    return device


def _each_once(values: list[T]) -> list[T]:
    if not values:
        raise ValueError("name at least one")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return values


def _as_string(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _as_int(value: Any) -> Any:
    return operator.index(value) if isinstance(value, np.integer) else value


Index = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_as_int)]
Count = Annotated[int, Field(ge=1, lt=2**63), BeforeValidator(_as_int)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ContextSize = Annotated[int, Field(ge=3, le=2**20)]
"""BOS, a token, and one that it predicts."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
PathStr = Annotated[str, Field(min_length=1), BeforeValidator(_as_string)]
"""A path, or a name: a ``pathlib.Path`` becomes a string."""
Device = Annotated[str, AfterValidator(_usable)]
EachOnce = Annotated[list[T], Field(strict=False), AfterValidator(_each_once)]
"""One or more different values."""


class Flag(BooleanOptionalAction):
    """simple_parsing's for a bool, ``--flag`` or ``--flag false``, without its ``--noflag``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, **kwargs)
        self.option_strings: list[str] = list(option_strings)


@dataclass_transform(
    kw_only_default=True, field_specifiers=(dataclasses.field, simple_parsing.field)
)
def config(cls: type[T]) -> type[T]:
    """Make a dataclass, of keyword arguments, that raises one ValueError for all bad fields."""
    made: Any = dataclass(kw_only=True, config=STRICT)(cls)
    hints = get_type_hints(cls, include_extras=True)
    # simple_parsing looks names up in the module of the class that has the field, and no further.
    made.__annotations__ = {name: hints[name] for name in cls.__annotations__}
    check = made.__init__

    @wraps(check)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            check(self, *args, **kwargs)
        except ValidationError as error:
            raise ValueError(sentence(error.errors())) from None

    made.__init__ = __init__
    return made


def check(kind: Any, **values: Any) -> None:
    """Raise ValueError, which names it and its value, for an argument that is not of a kind."""
    adapter = TypeAdapter(kind, config=STRICT)
    for name, value in values.items():
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(sentence(error.errors(), name)) from None


def sentence(problems: Iterable[Any], *names: str) -> str:
    """What pydantic says of each problem, in one line; names: where the value itself is."""
    sentences = []
    for problem in problems:
        said = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
        said = said.replace("greater than or equal to", "at least")
        name, *places = [*names, *problem["loc"]] or [""]
        name = f"{name}{''.join(f'[{place!r}]' for place in places)}"
        known = "input" in problem and problem["type"] != "missing"
        value = f"={problem['input']!r}" if known else ""
        sentences.append(f"{name}{value}: {said}" if name else said)
    return "; ".join(sentences)
