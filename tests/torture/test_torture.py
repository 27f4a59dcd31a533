"""Kills at random moments, two processes at once and full disks, on the real commands.

`make torture`; not part of `make test`. Commands run in processes of their own, forked from one
that has imported the package, on a tiny model and text. Whatever happens to them, the same
command has to end with the files of an undisturbed one, bit by bit.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from mxd_lens import startup
from mxd_lens.cli import main
from mxd_lens.files import LOCK
from mxd_lens.runs.config import COMPARISON_FILENAME

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "sae_lens.evals"])
N_KILLS = {signal.SIGKILL: 20, signal.SIGTERM: 6, signal.SIGINT: 6}


class Command:
    """A running ``mxd-lens`` command."""

    def __init__(self, log: Path, *arguments: object):
        self.log = log
        log.unlink(missing_ok=True)
        self.process = CONTEXT.Process(target=_run, args=(str(log), [str(a) for a in arguments]))
        self.process.start()
        while not log.exists():
            time.sleep(0.001)

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def end(self) -> int:
        self.process.join(300)
        assert self.process.exitcode is not None, f"hangs:\n{self.log.read_text()}"
        return self.process.exitcode

    @property
    def sentence(self) -> str:
        """What the command said of its end, where it was not a success."""
        text = self.log.read_text()
        assert "Traceback" not in text, text
        return text[text.rindex("mxd-lens: ") :] if "mxd-lens: " in text else ""


def _run(log: str, arguments: list[str]) -> None:
    startup.leave_on_signals()  # as while the command is imported
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    main(arguments)


@pytest.fixture(scope="module")
def commands(llama_folder, tmp_path_factory):
    """``commands[name](folder)``: arguments that do that in this folder."""
    rng, words = random.Random(0), ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "saw"]
    documents = [" ".join(rng.choices(words, k=rng.randint(5, 40))) for _ in range(200)]
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n\n".join(documents))
    common = ["--model", llama_folder, "--layer", 1, "--dataset", text, "--device", "cpu"]
    common += ["--training_tokens", 32 * 150, "--batch_size", 32, "--context_size", 8]
    common += ["--lm_batch_size", 4, "--heldout_documents", 40]
    one = ["train", *common, "--k", 3, "--d_sae", 12, "--output"]
    many = ["compare", *common, "--k", 2, 3, "--architectures", "mxd", "topk_transcoder"]
    many += ["--expansion", 8, "--n_sequences", 4, "--output"]
    return {
        "train": lambda folder: [*one, folder / "run"],
        "train on a cache": lambda folder: [*one, folder / "run", "--activations", folder / "acts"],
        "train another on that cache": lambda folder: [
            *one[:-1],
            *("--seed", 1, "--output", folder / "other"),
            *("--activations", folder / "acts"),
        ],
        "compare": lambda folder: [*many, folder / "run"],
        "train in a comparison": lambda folder: [
            *[*one[: one.index("--k")], "--k", 2, "--expansion", 8],
            *("--activations", folder / "run" / "activations"),
            *("--output", folder / "run" / "layer1-mxd-k2-seed0"),
        ],
        "evaluate": lambda folder: ["evaluate", folder / "run", "--dataset", text],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, but for pages, in which plotly has random names."""
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    return {
        str(path.relative_to(folder)): b"" if path.suffix == ".html" else path.read_bytes()
        for path in files
    }


@pytest.fixture
def undisturbed(commands, tmp_path):
    """``undisturbed(*names)``: what these commands leave, and the seconds they take."""

    def run(*names):
        start = time.monotonic()
        for name in names:
            command = Command(tmp_path / "log", *commands[name](tmp_path / "whole"))
            assert command.end() == 0, command.log.read_text()
        return contents(tmp_path / "whole"), time.monotonic() - start

    return run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["train", "train on a cache", "compare"])
def test_a_signal_at_any_moment_loses_nothing(commands, undisturbed, tmp_path, name, number):
    whole, seconds = undisturbed(name)
    moments = random.Random(name).sample(range(1000), N_KILLS[number])
    for i, moment in enumerate(sorted(moments)):
        folder = tmp_path / str(i)
        for part in (1, 0.5):  # killed, and once more while it resumes
            command = Command(tmp_path / "log", *commands[name](folder))
            time.sleep(part * seconds * moment / 1000)
            command.kill(number)
            code = command.end()
            if number != signal.SIGKILL and code != 0:
                assert code == 128 + number
                assert command.sentence, command.log.read_text()
        command = Command(tmp_path / "log", *commands[name](folder))
        assert command.end() == 0, command.log.read_text()
        assert contents(folder) == whole, f"killed after {moment / 1000:.0%}"
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train", "train"),
        ("train on a cache", "train on a cache"),
        ("train on a cache", "train another on that cache"),
        ("compare", "compare"),
        ("compare", "train in a comparison"),
        ("train", "evaluate"),
    ],
)
def test_two_processes_at_once_mix_nothing(commands, undisturbed, tmp_path, first, second):
    refused = second == "train in a comparison"
    names = [first] if refused else list(dict.fromkeys([first, second]))
    whole, seconds = undisturbed(*names)
    for i in range(8):
        folder = tmp_path / str(i)
        one = Command(tmp_path / "one", *commands[first](folder))
        time.sleep(i / 10 * seconds)
        while refused and not (folder / "run" / COMPARISON_FILENAME).exists():
            time.sleep(0.01)
        two = Command(tmp_path / "two", *commands[second](folder))
        for command in (one, two):
            if command.end() != 0:
                assert command.process.exitcode == 1
                assert command.sentence, command.log.read_text()
        assert not refused or two.process.exitcode == 1
        for name in names:
            command = Command(tmp_path / "log", *commands[name](folder))
            assert command.end() == 0, command.log.read_text()
        assert contents(folder) == whole
        shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(kib)``: a file system of that size, or made that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        again = "remount," if os.path.ismount(folder) else ""
        options = ["-t", "tmpfs", "-o", f"{again}size={kib}k", "tmpfs", str(folder)]
        subprocess.run(["mount", *options], check=True)
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["train", "train on a cache", "compare"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_full_disk_is_a_sentence_and_loses_nothing(
    commands, undisturbed, small_disk, tmp_path, name, share
):
    whole, _ = undisturbed(name)
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    folder = small_disk(max(4, int(share * size / 1024)))
    command = Command(tmp_path / "log", *commands[name](folder))
    assert command.end() == 1, command.log.read_text()
    assert command.sentence.startswith("mxd-lens: cannot write "), command.sentence
    assert "No space left on device" in command.sentence
    small_disk(1 << 20)
    command = Command(tmp_path / "log", *commands[name](folder))
    assert command.end() == 0, command.log.read_text()
    assert contents(folder) == whole
