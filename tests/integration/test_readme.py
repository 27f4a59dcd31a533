"""The README's example runs as printed."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_ten_lines(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(example, names)
    original = names["model"](names["tokens"], return_type="loss")
    torch.testing.assert_close(names["loss"], original, rtol=1e-4, atol=1e-3)
    assert names["ablated"] > names["loss"]
    assert str(torch.Size([*names["tokens"].shape, 64])) in capsys.readouterr().out
