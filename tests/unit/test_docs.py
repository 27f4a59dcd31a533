"""What the documentation names exists: commands and their options, and what its Python imports."""

import ast
import re
import shlex
from argparse import _SubParsersAction
from importlib import import_module
from pathlib import Path

import pytest

from mxd_lens.cli import make_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = r"``(.+?)``|`((?:[^`\n]|\n(?!\n))+)`|^ {4,}(\S.*)$"
OPTION = r"(?<![\w-])(--?[a-z]\w*)"


def options() -> dict[str, set[str]]:
    """Of each command."""
    (commands,) = (a for a in make_parser()._actions if isinstance(a, _SubParsersAction))
    found = {}
    for name, command in commands.choices.items():
        command._preprocessing(args=[])  # adds the fields of its dataclass
        found[name] = {option for action in command._actions for option in action.option_strings}
        found[name] |= {"--config_path"} if command.add_config_path_arg else set()
    return found


def code(page: Path) -> list[str]:
    """Its pieces of code that are no Python, without what a table says is another tool's."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text, lines, theirs = text.replace("\\\n", " "), [], False
    for line in text.splitlines():
        theirs = line.startswith("| there |") or (theirs and line.startswith("|"))
        lines.append(line.split("|", 2)[2] if theirs else line)
    found = re.findall(CODE, "\n".join(lines), re.MULTILINE)
    return ["".join(parts).partition("  #")[0] for parts in found]


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return options()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_named(page, known):
    for piece in code(page):
        command = re.search(r"(?:^|\s)mxd-lens (\w+)", piece)
        if command:
            assert command[1] in known, piece
            asked = known[command[1]]
        elif piece.startswith("--"):
            asked = set.union(*known.values())
        else:
            continue
        assert {*re.findall(OPTION, piece)} <= asked, piece


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_written_out_are_understood(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ {4,}(?:[A-Z_]+=\S+ +)*mxd-lens (.*)$", text, re.MULTILINE):
        make_parser().parse_args(shlex.split(line, comments=True))


def test_something_is_read():
    pieces = [piece for page in PAGES for piece in code(page)]
    assert sum("mxd-lens " in piece for piece in pieces) > 20
    assert sum(piece.startswith("--") for piece in pieces) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_python_imports_of_the_package_is_there(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if block.startswith("--8<"):  # a file's
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mxd_lens"):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
