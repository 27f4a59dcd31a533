"""Docstrings as Markdown: ``[*batch, k]`` is no emphasis, ``::`` before a block is a colon."""

import re

import griffe


class AsMarkdown(griffe.Extension):
    """Applied to every object once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            text = re.sub(r"(?<![\w`])\[\*(?=\w+[,\]])", r"[\\*", obj.docstring.value)
            obj.docstring.value = text.replace("::\n", ":\n")
