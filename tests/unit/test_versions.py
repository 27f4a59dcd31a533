"""What the package says of the versions it works with."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mxd_lens import startup

LOCK = Path(__file__).parents[2] / "requirements.lock"
DECLARED = [Requirement(line) for line in metadata.requires("mxd-lens") or []]


def names_and_versions():
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("declared", DECLARED, ids=str)
def test_the_lock_is_within_the_declared_ranges(declared):
    locked = [line for line in names_and_versions() if line.name == declared.name]
    assert locked or declared.name == "mxd-lens"
    for line in locked:
        ((_, version),) = [(s.operator, s.version) for s in line.specifier]
        assert declared.specifier.contains(version), line


@pytest.mark.parametrize(("package", "versions", "why"), startup.KNOWN_WRONG)
def test_what_is_known_to_be_wrong_is_refused(monkeypatch, package, versions, why):
    wrong = versions.removeprefix(">=") + ".0"
    (declared,) = [line for line in DECLARED if line.name == package]
    assert not declared.specifier.contains(wrong)
    assert SpecifierSet(versions).contains(wrong)
    startup.check_versions()
    monkeypatch.setattr(metadata, "version", lambda name: wrong)
    with pytest.raises(ImportError, match=f"{package} {wrong} is installed.*{why}.*pip install"):
        startup.check_versions()
    monkeypatch.setattr(sys, "argv", ["mxd-lens"])
    monkeypatch.setattr(startup, "leave_on_signals", lambda: None)
    with pytest.raises(SystemExit, match=f"mxd-lens: {package} {wrong} is installed"):
        startup.prepare()
