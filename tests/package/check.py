"""Run by an environment that has the package from a wheel or an sdist, and no checkout: it has the
checkout's files and no others, and the README's example works. See `make package`."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import files, version
from pathlib import Path

import mxd_lens
from mxd_lens.cli import CONFIGS, make_parser

CHECKOUT = Path(__file__).parents[2]
INSTALLED = Path(mxd_lens.__file__).parent


def files_in(package: Path) -> dict[str, bytes]:
    """What is in each file of the package."""
    return {
        str(path.relative_to(package)): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def main() -> None:
    assert INSTALLED.is_relative_to(sys.prefix), f"{INSTALLED} is not in {sys.prefix}"
    installed, ours = files_in(INSTALLED), files_in(CHECKOUT / "mxd_lens")
    assert installed == ours, sorted(name for name, _ in installed.items() ^ ours.items())
    beside = {file.parts[0] for file in files("mxd-lens") or []} - {"mxd_lens", ".."}
    assert all(name.endswith(".dist-info") for name in beside), beside
    command = Path(sys.prefix) / "bin" / "mxd-lens"
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    for config in CONFIGS.glob("*.yaml"):
        make_parser().parse_args(["train", "--config_path", config.stem])
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(example, {})
    print(f"mxd-lens {version('mxd-lens')} in {sys.prefix} is whole")


if __name__ == "__main__":
    main()
