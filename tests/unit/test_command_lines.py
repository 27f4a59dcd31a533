"""Whatever is asked of a command, it works or says in one sentence why not."""

import io
import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mxd_lens.cli import main

from ..conftest import TINY_RUN, WORDS

number = st.integers(-1, 40).map(str) | st.sampled_from(["", "x", "2.5", "nan", "1_0", "9" * 30])
real = st.floats(-1, 4, width=16).map(str) | st.sampled_from(["x", "nan", "inf", "-inf", "1e-320"])
yes_or_no = st.sampled_from(["true", "false", "maybe"])
column = st.sampled_from(["text", "label", "number", "nothing", ""])
good_text = st.sampled_from(["text.jsonl", "text.txt", "short.txt", "labelled.csv"])
bad_text = ["same.txt", "special.txt", "blank.txt", "empty.jsonl", "latin.txt", "broken.jsonl"]
text = good_text | st.sampled_from([*bad_text, "nothing.txt", "models"])
labelled = st.sampled_from(["labelled.csv", "lists.jsonl", "text.jsonl", "nothing.csv"])
architecture = st.sampled_from(["mxd", "mxd_paper", "topk", "topk_transcoder", "dense"])
architecture |= st.sampled_from(["topk_skip_transcoder", "batchtopk_mxd", "batchtopk_transcoder"])
architecture |= st.sampled_from(["batchtopk", "jumprelu", "standard", "relu", "mxd:paper", ""])
architecture |= st.just("molt")
sae_options = ["3", "{", "[]", "{}", '{"k": "three"}', '{"k": 2}', '{"d_sae": 0}', '{"d_in": 3}']
sae_options += ['{"l0_coefficient": "x"}', '{"l0_coefficient": 1}', '{"aux_loss_coefficient": -1}']
sae_options += ['{"dtype": "float16"}', '{"dtype": "x"}', '{"d_hidden": 7}']

SOURCE = {
    "dataset": text,
    "dataset_split": st.sampled_from(["train", "test", ""]),
    "text_column": column,
    "streaming": yes_or_no,
}
SIZES = ("layer", "expansion", "batch_size", "context_size", "lm_batch_size", "heldout_documents")
RUN = SOURCE | {
    **dict.fromkeys(SIZES, number),
    "training_tokens": st.integers(-1, 200).map(str),
    "model_class": st.sampled_from(["TransformerBridge", "HookedTransformer", "x"]),
    "autocast": yes_or_no,
    "device": st.sampled_from(["cpu", "meta", "quantum", "cuda:99", "cpu:x", ""]),
    "output": st.sampled_from(["text.txt", "text.txt/below"]),
    "model": st.sampled_from(["models", "nothing", "text.txt", ""]),
    "config_path": st.sampled_from(["text.txt", "own.yaml", "wrong.yaml", "nothing.yaml"]),
}
TRAIN = RUN | {
    **dict.fromkeys(["k", "d_sae", "lr_warm_up_steps", "lr_decay_steps", "seed"], number),
    "architecture": architecture,
    "lr": real,
    "sae_options": st.sampled_from(sae_options),
    "activations": st.sampled_from(["out/activations", "text.txt", ""]),
}
COMPARE = RUN | {
    "architectures": st.lists(architecture, max_size=2),
    "k": st.lists(number, max_size=2),
    "seeds": st.lists(number, max_size=2),
    "n_sequences": number,
    "probe": labelled,
}
SAMPLING = {
    "prompt": st.sampled_from(["the cat", "", "</s>", "dog " * 40]),
    "sample_tokens": number,
    "temperature": real,
    "top_p": real,
    "seed": number,
}
EVALUATE = SOURCE | {"n_sequences": number}
PROBE = {
    "k": number,
    "data": st.lists(labelled, max_size=2),
    "n_texts": number,
    "n_splits": st.integers(-1, 2).map(str),
    "dataset_split": st.sampled_from(["train", "test", ""]),
    "text_column": column,
    "label_column": column,
}
EXPERTS = {
    **SOURCE,
    **SAMPLING,
    "k": number,
    "n_tokens": number,
    "effect_strength": real,
    "sample_strength": real,
}
LABEL = {
    **{"k": number, "n_tokens": number, "n_experts": st.integers(-1, 3).map(str), "seed": number},
    "chat": st.sampled_from(["models", "nothing", "text.txt", ""]),
}
REPORT = {"k": number, "beside": st.sampled_from(["finished", "nowhere", "text.txt", ""])}
REPORT["beside"] |= st.sampled_from(
    [f"out/layer1-{name}" for name in ("topk-k2-seed0", "dense-seed0")]
)
STEER = {
    **SAMPLING,
    "k": number,
    "experts": st.lists(number, max_size=2),
    "n_experts": st.integers(-1, 3).map(str),
    "strengths": st.lists(real, max_size=2),
    "n_samples": st.integers(-1, 3).map(str),
    "edit": st.sampled_from(["direction", "activation", "paper", "x"]),
}
CHOICE = {"k": number, "seed": number, "architecture": architecture}
GRAPH = CHOICE | {
    **{"prompt": st.sampled_from(["the cat", "", "</s>", "x"]), "ablations": number},
    **dict.fromkeys(["target", "against"], st.sampled_from(["cat", "dog", "the cat", "", "x"])),
    "max_nodes": number,
}
FINETUNE = CHOICE | {
    **{"training_tokens": number, "lr": real, "lm_batch_size": number, "reconstruction": real},
    "output": st.sampled_from(["out", "text.txt", "out/tuned"]),
}


@st.composite
def some_of(draw, options, n=2):
    """Up to n of the options, with values."""
    names = draw(st.lists(st.sampled_from(list(options)), max_size=n, unique=True))
    return {name: draw(options[name]) for name in names}


class Hang(BaseException):
    """A command took too long."""


@contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


SMALL = {name: str(value) for name, value in TINY_RUN.items()}
SMALL |= {"model": "models", "dataset": "text.jsonl", "output": "out"}
SMALL |= {"training_tokens": "64", "heldout_documents": "20"}
COMPARED = {"architectures": ["topk"], "k": ["2"], "expansion": "8", "n_sequences": "4"}


def options(values: dict[str, str | list[str]]) -> list[str]:
    return [
        part
        for name, value in values.items()
        for part in ([f"--{name}={value}"] if isinstance(value, str) else [f"--{name}", *value])
    ]


@pytest.fixture(scope="module")
def folder(llama_folder, tmp_path_factory, offline):
    """The current directory: a model, texts, labelled texts, and a finished comparison."""
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(llama_folder, folder / "models")
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for _ in range(60)]
    rows = [json.dumps({"text": text, "number": i}) for i, text in enumerate(documents)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    (folder / "text.txt").write_text("\n\n".join(documents))
    (folder / "short.txt").write_text("\n\n".join(documents[:12]))
    (folder / "same.txt").write_text("\n\n".join(documents[:1] * 60))
    (folder / "special.txt").write_text("\n\n".join("</s>" * (1 + i) for i in range(60)))
    (folder / "blank.txt").write_text(" \n\n" * 60)
    (folder / "empty.jsonl").touch()
    (folder / "own.yaml").write_text("autocast: true\nexpansion: 8\n")
    (folder / "wrong.yaml").write_text("autocast: maybe\nwidth: 3\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 \xff")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    labels = [f"{text},{'ab'[i % 2]}" for i, text in enumerate(documents)]
    (folder / "labelled.csv").write_text("\n".join(["text,label", *labels]))
    lists = [json.dumps({"text": text, "label": ["a"]}) for text in documents]
    (folder / "lists.jsonl").write_text("\n".join(lists))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        several = {"architectures": ["mxd", "topk", "dense"], "output": "finished"}
        main(["compare", *options(SMALL | COMPARED | several)])
        yield folder


@pytest.fixture(scope="module")
def attempt(folder):
    """``attempt(results, *arguments)``: a command that may write to ``out`` and nowhere else."""

    def others():
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files if not path.is_relative_to(out)}

    out = folder / "out"
    before = others()

    def attempt(results: str, *arguments: str) -> None:
        there = set(out.rglob("*"))
        printed, said = io.StringIO(), io.StringIO()
        try:
            with no_hang(30), redirect_stdout(printed), redirect_stderr(said):
                main(list(arguments))
        except SystemExit as stopped:
            if stopped.code == 2:
                assert said.getvalue().startswith("usage: ")
            else:
                assert str(stopped.code).startswith("mxd-lens: ") and "\n" not in stopped.code
        else:
            written = set(out.glob(results)) - there
            assert written and all(path.read_bytes() for path in written)
        assert others() == before

    return attempt


RUNS = st.sampled_from(
    ["out", "out/layer1-mxd-k2-seed0", "out/layer1-topk-k2-seed0", "out/layer1-dense-seed0"]
)
RUNS |= st.sampled_from(["nowhere", "text.txt"])
SAMPLED = {"sample_tokens": "3", "n_samples": "2", "strengths": ["1"], "experts": ["1"]}
COMMANDS = {
    "train": (45, TRAIN, SMALL | {"k": "2", "d_sae": "12"}, "results.json"),
    "compare": (30, COMPARE, SMALL | COMPARED, "results.json"),
    "evaluate": (25, EVALUATE, {"dataset": "short.txt", "n_sequences": "4"}, "**/results-*.html"),
    "probe": (
        *(25, PROBE),
        {"data": ["labelled.csv"], "n_texts": "20", "n_splits": "1"},
        "*/probe.json",
    ),
    "experts": (
        *(25, EXPERTS),
        {"n_tokens": "300", "effect_strength": "0", "sample_tokens": "2"},
        "*/experts.json",
    ),
    "label": (5, LABEL, {"n_tokens": "200", "n_experts": "2"}, "*/labels.json"),
    "steer": (25, STEER, SAMPLED, "*/steering.json"),
    "report": (10, REPORT, {}, "*/report.html"),
    "graph": (15, GRAPH, {"prompt": "the cat", "architecture": "mxd"}, "**/graph-*.html"),
    "finetune": (
        *(10, FINETUNE),
        {"architecture": "mxd", "training_tokens": "40", "output": "out/tuned"},
        "tuned/finetuned.json",
    ),
    "export": (
        *(5, CHOICE),
        *({"output": "out/set"}, "set/config.yaml"),
    ),
    "convert": (
        *(5, {"model": st.sampled_from(["x", ""]), "output": st.sampled_from(["text.txt", "out"])}),
        *({"output": "out/layers"}, "layers/*/cfg.json"),
    ),
}
"""How often it is tried, options, what they are else, and the results of a success."""


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_is_asked(attempt, command):
    n, possible, usual, results = COMMANDS[command]
    phases = [Phase.generate, Phase.shrink]  # explaining traces every line
    reads_runs = command not in ("train", "compare")

    @settings(max_examples=n, deadline=None, derandomize=True, database=None, phases=phases)
    @given(run=RUNS if reads_runs else st.none(), values=some_of(possible))
    def ask(run, values):
        if reads_runs:
            shutil.copytree("finished", "out")
        try:
            attempt(results, command, *([run] if reads_runs else []), *options(usual | values))
        finally:
            shutil.rmtree("out", ignore_errors=True)

    ask()
