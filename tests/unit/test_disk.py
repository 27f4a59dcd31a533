"""Nothing on disk is deleted, mixed or lost: claims, locks, checkpoints, caches, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from datasets import Dataset
from sae_lens import SAE

from mxd_lens import compare, train
from mxd_lens.cli import main
from mxd_lens.files import locked, write_json
from mxd_lens.runs.claims import claim_folder
from mxd_lens.runs.compare import results_stem
from mxd_lens.runs.fingerprint import model_fingerprint, text_fingerprint

from ..conftest import randomise

SMALL = {"architectures": ["topk_transcoder"], "k": [2]}
"""A comparison of one layer."""


class Held:
    """A folder that another process is at work in, for as long as the block lasts."""

    def __init__(self, folder: Path):
        self.context = get_context("spawn")
        self.held, self.release = self.context.Event(), self.context.Event()
        self.process = self.context.Process(target=_hold, args=(folder, self.held, self.release))

    def __enter__(self):
        self.process.start()
        assert self.held.wait(120)
        return self

    def __exit__(self, *_):
        self.release.set()
        self.process.join()


def _hold(folder, held, release):
    with locked(folder):
        held.set()
        release.wait()


class TestTheUsersFiles:
    def test_only_checkpoints_of_the_run_are_removed(self, stopped, tiny_bridge, documents):
        cfg = stopped()
        folder = Path(cfg.output)
        (folder / "checkpoints" / "notes.txt").write_text("mine")
        (folder / "checkpoints" / "mine").mkdir()
        foreign = folder / "checkpoints" / "2024"
        foreign.mkdir()
        write_json(foreign / "runner_cfg.json", {"model_name": "gpt2"})
        (foreign / "thesis.txt").write_text("mine")
        (folder / ".my.thesis.unfinished").mkdir()
        (folder / "unfinished").mkdir()
        (folder / "unfinished" / "thesis.txt").write_text("mine")
        train(cfg, tiny_bridge, documents)
        left = {path.name for path in (folder / "checkpoints").iterdir()}
        assert left == {"notes.txt", "mine", "2024"}
        assert (foreign / "thesis.txt").exists() and (folder / ".my.thesis.unfinished").exists()
        assert (folder / "unfinished" / "thesis.txt").read_text() == "mine"

    def test_a_link_out_of_the_folder_is_refused(self, tiny_bridge, documents, make_config):
        cfg = make_config()
        elsewhere = Path(cfg.output).parent / "elsewhere"
        (elsewhere / "32").mkdir(parents=True)
        Path(cfg.output).mkdir()
        claim_folder(cfg)
        (Path(cfg.output) / "checkpoints").symlink_to(elsewhere)
        with pytest.raises(ValueError, match="checkpoints is a symbolic link"):
            train(cfg, tiny_bridge, documents)
        assert (elsewhere / "32").exists()

    @pytest.mark.parametrize("name", ["layer", "checkpoints", "results.json", "sources.json"])
    def test_a_folder_with_something_else_in_it_is_refused(self, make_config, name):
        cfg = make_config()
        Path(cfg.output).mkdir()
        (Path(cfg.output) / name).write_text("mine")
        with pytest.raises(ValueError, match=f"holds something else, with {name} in it"):
            train(cfg, None)
        assert (Path(cfg.output) / name).read_text() == "mine"

    def test_a_comparison_and_a_run_keep_out_of_each_others_folders(
        self, make_compare, make_config, tiny_bridge, documents
    ):
        comparison = make_compare(**SMALL)
        compare(comparison, tiny_bridge, documents)
        with pytest.raises(ValueError, match=r"something else, with \S+ in it"):
            train(make_config(output=comparison.output), tiny_bridge, documents)
        run = make_config()
        train(run, tiny_bridge, documents)
        with pytest.raises(ValueError, match=r"something else, with runner_cfg\.json in it"):
            compare(make_compare(output=run.output, **SMALL), tiny_bridge, documents)

    @pytest.mark.parametrize("name", ["runner_cfg.json", "sources.json"])
    def test_a_foreign_file_by_the_name_of_ours(self, make_config, tiny_bridge, documents, name):
        cfg = make_config()
        train(cfg, tiny_bridge, documents)
        for content in ("[]", "{", "3"):
            (Path(cfg.output) / name).write_text(content)
            with pytest.raises(ValueError, match=f"{name} is not"):
                train(cfg, tiny_bridge, documents)

    def test_activations_are_not_written_over_a_file(self, tiny_bridge, documents, make_config):
        acts = Path(make_config().output).parent / "acts"
        (acts / "layer1").mkdir(parents=True)
        (acts / "layer1" / "pairs.bin").write_bytes(b"mine")
        with pytest.raises(ValueError, match=r"something else, with pairs\.bin in it"):
            train(make_config(activations=str(acts)), tiny_bridge, documents)
        assert (acts / "layer1" / "pairs.bin").read_bytes() == b"mine"

    def test_results_on_texts_of_one_name_are_two_files(self, tmp_path):
        for folder in "ab":
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "val.jsonl").write_text("")
        stems = {results_stem(str(tmp_path / folder / "val.jsonl")) for folder in "ab"}
        assert len(stems) == 2 and all(stem.startswith("results-val-") for stem in stems)


class TestOneProcessAtATime:
    def test_a_second_process_is_refused_in_a_sentence(self, make_config):
        cfg = make_config()
        refused = pytest.raises(ValueError, match="another mxd-lens process")
        with Held(Path(cfg.output)), refused:
            train(cfg)

    def test_who_shares_activations_waits_until_they_are_there(
        self, make_config, tiny_bridge, documents, capsys, tmp_path
    ):
        cfg = make_config(activations=str(tmp_path / "acts"))
        with Held(tmp_path / "acts" / "layer1") as held:
            start = time.monotonic()
            signal.signal(signal.SIGALRM, lambda *_: held.release.set())
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            train(cfg, tiny_bridge, documents)
            assert time.monotonic() - start > 0.5
        assert "waiting for another process that is filling" in capsys.readouterr().err


class TestAResumedRunIsTheSameRun:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [({"k": 2}, "k=2"), ({"seed": 5}, "seed=5"), ({"lr": 0.5}, "lr=0.5")],
    )
    def test_a_checkpoint_of_another_run_is_refused(
        self, stopped, tiny_bridge, documents, edit_json, fields, message
    ):
        cfg = stopped()
        (marker,) = Path(cfg.output).glob("checkpoints/*/runner_cfg.json")
        edit_json(marker, **fields)
        with pytest.raises(ValueError, match=f"was made with {message}"):
            train(cfg, tiny_bridge, documents)

    def test_a_marker_that_says_nothing_is_not_the_runs(self, stopped, tiny_bridge, documents):
        cfg = stopped()
        write_json(Path(cfg.output) / "runner_cfg.json", {})
        with pytest.raises(ValueError, match=r"model=None.* and this asks for .*model="):
            train(cfg, tiny_bridge, documents)

    def test_a_layer_without_its_configuration_is_found_first(
        self, tiny_bridge, documents, make_config, at_step
    ):
        cfg = make_config()
        train(cfg, tiny_bridge, documents)
        (cfg.layer_path / "cfg.json").unlink()
        with (
            at_step(0, lambda: pytest.fail("trained first")),
            pytest.raises(ValueError, match=r"layer is no layer, it has no cfg\.json"),
        ):
            train(cfg, tiny_bridge, documents)

    def test_another_text_or_model_is_noticed(self, stopped, tiny_bridge, documents, monkeypatch):
        cfg = stopped()
        texts = documents["text"]
        other = Dataset.from_dict({"text": [*texts[:100], "the cat sat", *texts[101:]]})
        with pytest.raises(ValueError, match="begun with another text"):
            train(cfg, tiny_bridge, other)
        monkeypatch.setattr("mxd_lens.runs.config.load_text", lambda *_: other)
        with pytest.raises(ValueError, match="begun with another text than 'tiny'"):
            train(cfg, tiny_bridge)
        randomise(tiny_bridge, 1e-3)
        with pytest.raises(ValueError, match="begun with another model"):
            train(cfg, tiny_bridge, documents)

    def test_a_changed_file_is_noticed_even_when_the_run_is_finished(
        self, llama_folder, documents, make_config, text
    ):
        cfg = make_config(model=str(llama_folder), dataset=text)
        train(cfg)
        evaluated = ["evaluate", cfg.output, "--n_sequences", "4"]
        main([*evaluated, "--dataset", text])
        documents.select(range(150)).to_json(text)
        main([*evaluated, "--dataset", text])
        with pytest.raises(SystemExit, match="begun with another text"):
            main(evaluated)
        with pytest.raises(ValueError, match="begun with another text"):
            train(cfg)

    def test_a_stale_summary_is_mended(self, make_compare, tiny_bridge, documents):
        cfg = make_compare(architectures=["topk_transcoder"])
        compare(cfg, tiny_bridge, documents)
        results = Path(cfg.output) / "results.json"
        whole = results.read_text()
        written = json.loads(whole)
        written["rows"] = written["rows"][:1]
        write_json(results, written)  # as a kill after the last row leaves it
        compare(cfg)
        assert results.read_text() == whole

    def test_a_killed_claim_does_not_brick_the_run(self, tiny_bridge, documents, make_config):
        cfg = make_config()
        Path(cfg.output).mkdir()
        (Path(cfg.output) / ".runner_cfg.json.123.mxd-lens-unfinished").write_text('{"model": "ti')
        train(cfg, tiny_bridge, documents)
        assert not [*Path(cfg.output).glob(".*unfinished")]

    def test_fingerprints_tell_models_and_texts_apart(self, tiny_bridge, documents):
        before = model_fingerprint(tiny_bridge), text_fingerprint(documents)
        assert before == (
            model_fingerprint(tiny_bridge),
            text_fingerprint(documents.select(range(200))),
        )
        tiny_bridge.half()
        assert model_fingerprint(tiny_bridge) != before[0]
        assert text_fingerprint(documents.shuffle(seed=1)) != before[1]
        streamed = documents.to_iterable_dataset()
        assert text_fingerprint(streamed) == text_fingerprint(streamed)


class TestAFullDisk:
    def test_a_checkpoint_that_does_not_fit_is_a_sentence(
        self, make_config, tiny_bridge, documents, monkeypatch
    ):
        """/dev/full is a real full disk, for one file."""
        cfg = make_config()
        mkdir = Path.mkdir

        def fill(path, *args, **kwargs):
            mkdir(path, *args, **kwargs)
            state = path / "trainer_state.pt"
            if path.parent.name == "checkpoints" and not state.is_symlink():
                state.symlink_to("/dev/full")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", fill)
            with pytest.raises(OSError, match=r"cannot write \S+checkpoints/352"):
                train(cfg, tiny_bridge, documents)
        assert not [*(Path(cfg.output) / "checkpoints").iterdir()]
        train(cfg, tiny_bridge, documents)


class TestSignals:
    def test_another_programs_are_left_alone(self, tmp_path):
        (tmp_path / "job.py").write_text(
            "import signal\n"
            "before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
            "import mxd_lens\n"
            "assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n"
        )
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__init__.py").write_text((tmp_path / "job.py").read_text())
        (tmp_path / "package" / "__main__.py").touch()
        for arguments in (["job.py"], ["-m", "package"]):
            subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("command", [["-m", "mxd_lens"], [shutil.which("mxd-lens") or ""]])
    def test_while_the_command_is_imported(self, number, command):
        if not command[0]:
            command = [str(Path(sys.executable).with_name("mxd-lens"))]
        process = subprocess.Popen(
            [sys.executable, *command, "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(1.5)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        assert error.strip() == "mxd-lens: interrupted"
        assert process.returncode == 128 + number

    def test_termination_while_the_model_is_measured(
        self, llama_folder, make_config, text, monkeypatch, capsys
    ):
        cfg = make_config(model=str(llama_folder), dataset=text)
        train(cfg)
        monkeypatch.setattr(
            SAE, "run_with_cache", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
        )
        with pytest.raises(SystemExit) as left:
            main(["evaluate", cfg.output, "--n_sequences", "4"])
        assert left.value.code == 128 + signal.SIGTERM
        assert capsys.readouterr().err.strip().splitlines()[-1] == (
            "mxd-lens: terminated; the same command goes on with what is not finished"
        )
