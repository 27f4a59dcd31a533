"""All that the package exports has a type, which a type checker of whoever uses it need not guess.
See `make check-type`.

Packages without types are read as if they had some: what is inferred of them is theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

UNTYPED = ("datasets", "sae_lens", "simple_parsing")
CHECKOUT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def main() -> int:
    with TemporaryDirectory() as folder:
        for name in UNTYPED:
            spec = find_spec(name)
            assert spec is not None and spec.origin is not None, f"{name} is not installed"
            marked = Path(folder) / name
            marked.mkdir()
            for path in Path(spec.origin).parent.iterdir():
                (marked / path.name).symlink_to(path)
            (marked / "py.typed").touch()
        found = [f"{BIN}{os.pathsep}{os.environ['PATH']}", f"{CHECKOUT}{os.pathsep}{folder}"]
        done = subprocess.run(
            [BIN / "basedpyright", "--verifytypes", "mxd_lens", "--ignoreexternal"],
            env=os.environ | dict(zip(("PATH", "PYTHONPATH"), found, strict=True)),
            stdout=subprocess.PIPE,
            text=True,
        )
    print(done.stdout[max(0, done.stdout.find("\nSymbols ")) :].strip())
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
