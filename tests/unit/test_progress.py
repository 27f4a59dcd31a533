"""Progress of the command: bars on a terminal, a line now and then where there is none."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from itertools import count

import pytest
from datasets import Dataset
from tqdm import tqdm

from mxd_lens import startup, train

from ..conftest import TINY_RUN


@pytest.fixture
def in_lines(monkeypatch):
    monkeypatch.setattr(tqdm, "display", tqdm.display)  # to be set back
    startup.progress_in_lines()


def test_a_line_every_half_minute_and_the_last(in_lines, monkeypatch, capsys):
    seconds = count()
    monkeypatch.setattr(startup.time, "monotonic", lambda: next(seconds))
    with tqdm(desc="Steps", total=100, mininterval=0, miniters=1) as bar:
        for _ in range(100):
            bar.update()
    for _ in tqdm(range(100), desc="Gone", leave=False):
        pass
    lines = capsys.readouterr().err.splitlines()
    shown = [line.split("/")[0].split()[-1] for line in lines]
    assert shown == ["30", "60", "90", "100"]
    assert all(line.startswith("Steps: ") for line in lines)


def test_bars_of_other_libraries(in_lines, capsys, make_config, tiny_bridge, documents):
    train(make_config(), tiny_bridge, documents)
    Dataset.from_dict({"n": [*range(10)]}).map(lambda row: row)
    err = capsys.readouterr().err
    assert "\r" not in err and "\n\n" not in err
    for bar in ("mse_loss", "Map"):  # SAELens' and datasets'
        (line,) = [line for line in err.splitlines() if bar in line]
        assert "100%" in line


def test_other_programs_bars_are_left_alone(capsys):
    for _ in tqdm(range(3)):
        pass
    assert capsys.readouterr().err.count("\r") > 1


@pytest.mark.parametrize("terminal", [False, True])
def test_the_command(terminal, llama_folder, text, tmp_path):
    where = {"model": llama_folder, "dataset": text, "output": tmp_path / "run"}
    settings = TINY_RUN | where | {"d_sae": 8, "k": 2, "training_tokens": 32 * 400}
    command = [sys.executable, "-m", "mxd_lens", "train"]
    command += [str(part) for name in settings for part in (f"--{name}", settings[name])]
    read, write = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=write)
    os.close(write)
    said = b""
    try:
        while block := os.read(read, 1 << 16):
            said += block
    except OSError:  # Linux' end of a pty
        pass
    os.close(read)
    assert process.wait() == 0, said.decode()
    assert b"mse_loss" in said
    if terminal:
        assert said.count(b"\r") > said.count(b"\r\n") + 20
    else:
        assert b"\r" not in said
        assert said.count(b"\n") < 15
