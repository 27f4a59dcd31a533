"""Run by an environment that has the package from a wheel or an sdist, and no checkout: what the
package needs is there, and the README's example works. See `make package`."""

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


def main() -> None:
    assert INSTALLED.is_relative_to(sys.prefix), f"{INSTALLED} is not in {sys.prefix}"
    for path in sorted((CHECKOUT / "mxd_lens").rglob("*")):
        name = path.relative_to(CHECKOUT / "mxd_lens")
        if path.is_file() and "__pycache__" not in path.parts:
            assert (INSTALLED / name).read_bytes() == path.read_bytes(), f"{name} is missing"
    unwanted = [str(file) for file in files("mxd-lens") or [] if file.parts[0] == "tests"]
    assert not unwanted, unwanted
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
