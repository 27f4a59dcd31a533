"""The ``mxd-lens`` command."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME
from simple_parsing import ArgumentParser
from simple_parsing import field as argument
from transformers.utils.logging import disable_progress_bar

from mxd_lens import startup
from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.data.reading import check_heldout
from mxd_lens.data.text import load_text
from mxd_lens.demo.wheels import AssetError
from mxd_lens.fields import Count, Name, PathStr, config
from mxd_lens.files import locked, read_json, write_json
from mxd_lens.models.load import bfloat16_is_fast, load_model
from mxd_lens.models.site import mlp_hooks
from mxd_lens.report.page import agreement_of, write_comparison_page, write_report, write_run_page
from mxd_lens.report.tables import comparison_table, table
from mxd_lens.runs.analyse import (
    AnalysisConfig,
    ExpertsConfig,
    ProbeConfig,
    SteerConfig,
    probe_table,
    run_experts,
    run_probe,
    run_steer,
    steering_table,
)
from mxd_lens.runs.claims import check_sources, claim_folder
from mxd_lens.runs.compare import (
    CompareConfig,
    compare,
    finished_runs,
    identity,
    measure_again,
    results_stem,
)
from mxd_lens.runs.config import COMPARISON_FILENAME, TrainConfig, load_dataset, load_documents
from mxd_lens.runs.presets import PRESETS, Preset, dry_run
from mxd_lens.runs.results import ExpertsFile, Row, load_layer
from mxd_lens.runs.train import check_layer, train


@config
class EvaluateConfig:
    """Which run to evaluate, and on what."""

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train` or `mxd-lens compare`."""
    dataset: PathStr | None = None
    """Other text than the run's held-out documents, named as for train."""
    text_column: Name = "text"
    """Column of that text."""
    n_sequences: Count = 64
    """Sequences on which cross-entropies are taken."""


@config
class DemoConfig:
    """Where the demo's run goes."""

    output: PathStr = "runs/demo"
    """Folder of the run; what it holds is reused."""


def run_evaluation(
    cfg: TrainConfig,
    dataset: str | None = None,
    text_column: str = "text",
    n_sequences: int = 64,
    model=None,
) -> None:
    """Evaluate a finished run: results.json and results.html in its folder, a table on stdout."""
    with locked(Path(cfg.output)):
        results = Path(cfg.output) / f"{results_stem(dataset)}.json"
        before = read_json(results, dict[str, Any]) or {}
        sae = load_layer(cfg.layer_path, cfg.device)
        own = None
        if dataset is None:
            own = load_dataset(cfg)
            text = load_documents(cfg, own)[1]
        else:
            text = load_text(dataset, text_column=text_column)
        model = model or load_model(cfg.model, cfg.model_class, cfg.device)
        check_sources(cfg, model, own)
        row, density = evaluate(model, sae, text, n_sequences=n_sequences, autocast=cfg.autocast)
        row = {**identity(cfg), **row, "dataset": dataset or f"{cfg.dataset} (held out)"}
        row = {**before, **row}  # a comparison has probed it
        page = results.with_suffix(".html")
        write_run_page(page, row, density)
        write_json(results, row)
    print(table(row))
    print(f"\n{results}  {page}  {cfg.layer_path}")


def run_train(cfg: TrainConfig) -> None:
    """Train, then evaluate on the held-out documents, unless that has been done already."""
    beside = Path(cfg.output).parent / COMPARISON_FILENAME
    if beside.exists():  # which measures its layers alike
        raise ValueError(f"{cfg.output} is in a comparison's folder: run `mxd-lens compare` there")
    with locked(Path(cfg.output)):
        claim_folder(cfg, write=False)
        row = read_json(Path(cfg.output) / "results.json", Row)
        if row is not None and cfg.finished:
            train(cfg)
            print(table(row))
            print(f"\nfound finished in {cfg.output}; delete that folder to run again")
            return
        dataset = load_dataset(cfg)
        heldout = load_documents(cfg, dataset)[1]
        model = load_model(cfg.model, cfg.model_class, cfg.device)
        check_layer(cfg, model)
        check_heldout(model, mlp_hooks(model, cfg.layer), heldout, context_size=cfg.context_size)
        train(cfg, model, dataset)
        run_evaluation(cfg, model=model)


def show_preset(preset: Preset, cfg: TrainConfig) -> None:
    """`mxd-lens train --preset ... --dry_run`."""
    shapes = dry_run(preset, cfg)
    total = sum(math.prod(shape) for shape in shapes.values())
    print(json.dumps({"config": asdict(cfg), "shapes": shapes, "n_parameters": total}, indent=2))


def run_evaluate(cfg: EvaluateConfig) -> None:
    """`mxd-lens evaluate`."""
    folder = Path(cfg.run)
    if (folder / RUNNER_CFG_FILENAME).exists():
        (run,) = finished_runs(folder)
        run_evaluation(run, cfg.dataset, cfg.text_column, cfg.n_sequences)
    else:
        path = measure_again(folder, cfg.dataset, cfg.text_column, cfg.n_sequences)
        write_comparison_page(path)
        print(comparison_table(read_json(path, list[Row])))


def show_probes(cfg: ProbeConfig) -> None:
    """`mxd-lens probe`."""
    paths = run_probe(cfg)
    print(f"\n{probe_table(paths)}\n")
    print(*paths)


def show_experts(cfg: ExpertsConfig) -> None:
    """`mxd-lens experts`."""
    for path in run_experts(cfg):
        found = read_json(path, ExpertsFile)
        meaningful = sum(expert["meaningful"] for expert in found["experts"])
        print(f"\n{path}: {found['n_live']:,} of {found['d_sae']:,} fire on ", end="")
        print(f"{found['n_tokens']:,} tokens; {meaningful:,} are meaningful. {found['rule']}")
        print(agreement_of(found))


def show_steering(cfg: SteerConfig) -> None:
    """`mxd-lens steer`."""
    paths = run_steer(cfg)
    print(f"\n{steering_table(paths)}\n")
    print(*paths)


def run_report(cfg: AnalysisConfig) -> None:
    """`mxd-lens report`."""
    for run in cfg.runs():
        print(write_report(Path(run.output)))


def run_compare(cfg: CompareConfig) -> None:
    """`mxd-lens compare`."""
    rows = compare(cfg, measured=write_comparison_page)
    print(f"\n{comparison_table(rows)}\n")
    print(f"{cfg.output}/results.json  {cfg.output}/results.html")


def run_demo(cfg: DemoConfig) -> None:
    """`mxd-lens demo`."""
    demo = CompareConfig(
        output=cfg.output,
        training_tokens=1_024_000,
        architectures=["mxd", "topk_transcoder"],
        k=[32],
        autocast=bfloat16_is_fast(),
        n_sequences=32,
    )
    rows = compare(demo, measured=write_comparison_page)
    print(f"\n{table(rows[0])}\n\n{comparison_table(rows)}\n")
    mxd = next(iter(demo.runs().values()))
    print(f"{demo.output}/results.json  {demo.output}/results.html  {mxd.layer_path}")


COMMANDS = {
    "demo": (
        DemoConfig,
        run_demo,
        "SmolLM2-135M, layer 6, Wikipedia: an MxD and a transcoder; about 12 minutes on 2 cores",
        "mxd-lens demo",
    ),
    "train": (
        TrainConfig,
        run_train,
        "train an MxD on a language model's MLP and measure it on held-out documents",
        "mxd-lens train --model gpt2 --layer 8 --dataset stas/openwebtext-10k --output runs/gpt2",
    ),
    "compare": (
        CompareConfig,
        run_compare,
        "train MxD, transcoders and SAE at several k on the same text; draw the frontier",
        "mxd-lens compare --layer 6 --k 8 16 32 64 --expansion 16 --autocast true",
    ),
    "evaluate": (
        EvaluateConfig,
        run_evaluate,
        "measure a run, or all layers of a comparison, on other text",
        "mxd-lens evaluate runs/demo --dataset demo:state-of-the-union",
    ),
    "probe": (
        ProbeConfig,
        show_probes,
        "tell topics, languages or your own labels by one, two, five or all units of a layer",
        "mxd-lens probe runs/demo --data demo:bbc demo:languages",
    ),
    "experts": (
        ExpertsConfig,
        show_experts,
        "describe every expert: where it fires, what it promotes, which others are like it",
        "mxd-lens experts runs/demo/mxd-k32-seed0 --n_tokens 100_000",
    ),
    "steer": (
        SteerConfig,
        show_steering,
        "steer single experts while the model writes; score coherence and fluency",
        "mxd-lens steer runs/demo --n_experts 20 --strengths 0.5 1 2",
    ),
    "report": (
        AnalysisConfig,
        run_report,
        "put all that is known of a run on one page, with a browser of its experts",
        "mxd-lens report runs/demo/mxd-k32-seed0",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; whatever the user can mend is one sentence and exit code 1."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--preset")
    preset = PRESETS.get(before.parse_known_args(arguments)[0].preset)

    parser = ArgumentParser(prog="mxd-lens", description="Mixtures of Decoders.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (cfg_class, _, description, example) in COMMANDS.items():
        command = commands.add_parser(
            name, help=description, description=f"{description}. Example: {example}"
        )
        values = None
        if cfg_class is TrainConfig:
            values = preset and preset.train_config()
            command.add_argument(
                "--preset", choices=PRESETS, help="One of the paper's settings, to start from."
            )
            command.add_argument(
                "--dry_run", action="store_true", help="With a preset: show it, train nothing."
            )
        command.add_arguments(cfg_class, dest="cfg", default=values)
    disable_progress_bar()
    try:
        with startup.raise_on_signals():
            chosen = parser.parse_args(arguments)
            if getattr(chosen, "dry_run", False):
                if preset is None:
                    raise ValueError("--dry_run shows a preset: name one with --preset")
                show_preset(preset, chosen.cfg)
            else:
                COMMANDS[chosen.command][1](chosen.cfg)
    except (ValueError, OSError, AssetError) as error:
        sys.exit(f"mxd-lens: {' '.join(str(error).split())}")
    except KeyboardInterrupt as error:
        said = str(error) or "interrupted; the same command goes on with what is not finished"
        print(f"\nmxd-lens: {said}", file=sys.stderr)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))


if __name__ == "__main__":
    main()
