"""The rooms of the package, and which way imports point between them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import mxd_lens

PACKAGE = Path(mxd_lens.__file__).parent
ROOMS = [
    *("startup", "fields", "files", "ranks"),
    *("demo", "layers", "models", "formats", "data", "analysis", "runs", "report"),
    *("hub", "cli", "__main__"),
]
"""From the bottom up; ``__init__`` exports from all of them."""


def name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
del MODULES["mxd_lens"]
ARCHITECTURES = {cls.__module__ for cls, _ in SAE_TRAINING_CLASS_REGISTRY.values()} & {*MODULES}
ARCHITECTURES -= {"mxd_lens.layers.mxd"}  # whose from_mlp reads any MLP


def imported(module: str) -> set[str]:
    """The modules of the package that a module imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            found |= names & MODULES.keys()
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_room():
    assert {room(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_upwards(module):
    above = ROOMS[ROOMS.index(room(module)) + 1 :]
    assert not [other for other in imported(module) if room(other) in above]


@pytest.mark.parametrize("module", MODULES)
def test_architectures_are_asked_by_name(module):
    assert len(ARCHITECTURES) > 2
    assert room(module) == "layers" or not imported(module) & ARCHITECTURES


def test_imports_have_no_circle():
    graph = {module: imported(module) for module in MODULES}
    assert sum(map(len, graph.values())) > 50  # so that it is really read
    TopologicalSorter(graph).prepare()
