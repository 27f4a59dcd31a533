"""What goes into the wheel: `make package` installs one."""

import re
from fnmatch import fnmatch
from pathlib import Path

import yaml

import mxd_lens

PACKAGE = Path(mxd_lens.__file__).parent
PYPROJECT = (PACKAGE.parent / "pyproject.toml").read_text()


def test_files_agree_on_the_version():
    version = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
    cited = yaml.safe_load((PACKAGE.parent / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (PACKAGE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)[1]
    assert cited["version"] == version
    assert newest in (version, "Unreleased")


def test_what_is_not_python_is_package_data():
    (line,) = [line for line in PYPROJECT.splitlines() if line.startswith("mxd_lens = [")]
    patterns = yaml.safe_load(line.partition("= ")[2])
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".py" and "__pycache__" not in path.parts]
    assert len(files) > 10
    assert not [path for path in files if not any(fnmatch(str(path), each) for each in patterns)]
    assert all([*PACKAGE.glob(pattern)] for pattern in patterns)
