"""The ``mxd-lens`` command."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from sae_lens.constants import RUNNER_CFG_FILENAME
from simple_parsing import ArgumentParser, NestedMode
from simple_parsing import field as argument
from transformers.utils.logging import disable_progress_bar

from mxd_lens import startup
from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.data.reading import check_heldout
from mxd_lens.demo.wheels import AssetError
from mxd_lens.fields import Count, Flag, PathStr, config
from mxd_lens.files import locked, read_json
from mxd_lens.hub import PushConfig, gather, send
from mxd_lens.models.load import bfloat16_is_fast
from mxd_lens.models.site import Site
from mxd_lens.ranks import Ranks, leave, lost_rank, take_device
from mxd_lens.report.graph import write_graph_page
from mxd_lens.report.page import (
    agreement_of,
    detection_of,
    nearness_of,
    write_comparison_page,
    write_joint_page,
    write_report,
    write_run_page,
)
from mxd_lens.report.tables import carried, comparison_table, in_place, markdown, table, tuned
from mxd_lens.report.tables import joint as joint_table
from mxd_lens.runs import analyse
from mxd_lens.runs.claims import check_sources, claim_folder
from mxd_lens.runs.compare import (
    CompareConfig,
    compare,
    measure_again,
    measure_together,
    results_stem,
)
from mxd_lens.runs.config import (
    COMPARISON_FILENAME,
    ManyConfig,
    Measuring,
    OtherText,
    TrainConfig,
    finished_runs,
)
from mxd_lens.runs.exchange import ConvertConfig, ExportConfig, run_convert, run_export
from mxd_lens.runs.finetune import TO_KEEP, FinetuneConfig, run_finetune
from mxd_lens.runs.graph import GraphConfig, run_graph
from mxd_lens.runs.results import (
    Beside,
    Experts,
    Joint,
    Labels,
    Row,
    load_layer,
    plain,
    read,
    read_rows,
    write,
)
from mxd_lens.runs.train import check_layer, train
from mxd_lens.runs.workers import Where, run_workers

CONFIGS = Path(__file__).parent / "runs" / "configs"
"""The paper's settings."""


@config
class EvaluateConfig(OtherText, Measuring):
    """Measure a run, or all layers of a comparison, on other text.

    Example: mxd-lens evaluate runs/demo --dataset demo:state-of-the-union
    """

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train`, or of `mxd-lens compare`: all of its layers."""
    joint: bool = argument(default=False, action=Flag)
    """Put layers of different MLPs in place at once: 1, 2, 4, ... and all."""
    each: bool = argument(default=False, action=Flag)
    """With --joint: measure each beside the others, too; 4 passes over the text for each."""


@config
class WorkersConfig(CompareConfig):
    __doc__ = CompareConfig.__doc__

    workers: Count = 1
    """Processes that share out the layers of one MLP, or of kept activations."""
    executor: Where = "local"
    """Where they work: on this machine, or as jobs of Slurm."""


@config
class DemoConfig:
    """SmolLM2-135M and Wikipedia: an MxD, a transcoder and a dense control.

    Example: mxd-lens demo
    """

    output: PathStr = "runs/demo"
    """Folder of the results. The same command again resumes what was interrupted there."""


def run_evaluation(
    run: TrainConfig, text: OtherText, n_sequences: int = 64, model: Any = None
) -> None:
    """Evaluate a finished run: results.json and results.html in its folder, a table on stdout."""
    with locked(Path(run.output)):
        path = Path(run.output) / f"{results_stem(text.dataset)}.json"
        before = read(path, Row)
        kept = {} if before is None else plain(before)  # of a comparison
        probes = {name: value for name, value in kept.items() if name.startswith("probe")}
        sae = load_layer(run.layer_path, run.device)
        own = run.load() if text.dataset is None else None
        documents = text.load() if own is None else run.documents(own)[1]
        model = model or run.load_model()
        check_sources([run], model, own)
        measured, density = evaluate(model, sae, documents, n_sequences=n_sequences)
        source = text.dataset or f"{run.dataset} (held out)"
        row = Row(**measured | run.identity | probes, dataset=source)
        page = path.with_suffix(".html")
        write_run_page(page, plain(row), density)
        write(path, row, indent=2)
    print(table(plain(row)))
    print(f"\n{path}  {page}  {run.layer_path}")


def run_train(cfg: ManyConfig) -> None:
    """Train, then evaluate on the held-out documents, unless that has been done already."""
    run = cfg.alone()
    if run is None:
        return run_compare(cfg)
    if cfg.probe:
        raise ValueError(
            f"probe={cfg.probe!r} is for several layers: run `mxd-lens probe {cfg.output} --data "
            f"{cfg.probe}` once this one is trained"
        )
    beside = Path(run.output).parent / COMPARISON_FILENAME
    if beside.exists():  # which measures its layers alike
        raise ValueError(f"{run.output} is in a comparison's folder: run `mxd-lens compare` there")
    ranks = Ranks.here()
    with locked(Path(run.output)) if ranks.first else nullcontext():
        row = None
        if ranks.first:
            claim_folder(run, write=False)
            row = read(Path(run.output) / "results.json", Row) if run.finished else None
        if ranks.agree(row is not None):
            train(run)
            if row is not None:
                print(table(plain(row)))
                print(f"\nfound finished in {run.output}; delete that folder to run again")
            return
        dataset = run.load()
        heldout = run.documents(dataset)[1]
        model = run.load_model()
        site = Site.at(model, run.layer)
        check_layer(run, site)
        check_heldout(site, heldout, context_size=run.context_size)
        train(run, model, dataset)
        if ranks.first:
            run_evaluation(run, OtherText(), cfg.n_sequences, model)
        ranks.wait()


def run_evaluate(cfg: EvaluateConfig) -> None:
    folder = Path(cfg.run)
    if cfg.each and not cfg.joint:
        raise ValueError("--each measures layers that are in place together: add --joint")
    if cfg.joint:
        path = measure_together(folder, cfg, cfg.n_sequences, each=cfg.each)
        write_joint_page(path)
        rows = plain(read(path, Joint))["rows"]
        for part in (joint_table(rows), carried(rows), *([in_place(rows)] if cfg.each else [])):
            print(markdown(*part), end="\n\n")
        print(f"\n{path}  {path.with_suffix('.html')}")
    elif (folder / RUNNER_CFG_FILENAME).exists():
        (run,) = finished_runs(folder)
        run_evaluation(run, cfg, cfg.n_sequences)
    else:
        path = measure_again(folder, cfg, cfg.n_sequences)
        write_comparison_page(path)
        print(comparison_table(read_rows(path)))


def show_finetuning(cfg: FinetuneConfig) -> None:
    path = run_finetune(cfg)
    written = read_json(path, dict[str, Any]) or {}
    print(markdown(*tuned(written)))
    if written["meaning_kept"] is False:
        print(
            f"\nExperts carry less: their share, or how many are alive, is below {TO_KEEP:.0%} of"
            " what it was. Tune at a lower --lr, on fewer tokens, or with --reconstruction 1."
        )
    print(f"\n{path}")


def show_probes(cfg: analyse.ProbeConfig) -> None:
    paths = analyse.run_probe(cfg)
    print(f"\n{analyse.probe_table(paths)}\n")
    print(*paths)


def show_experts(cfg: analyse.ExpertsConfig) -> None:
    for path in analyse.run_experts(cfg):
        found = plain(read(path, Experts))
        meaningful = sum(expert["meaningful"] for expert in found["experts"])
        print(f"\n{path}: {found['n_live']:,} of {found['d_sae']:,} fire on ", end="")
        print(f"{found['n_tokens']:,} tokens; {meaningful:,} are meaningful. {found['rule']}")
        print(agreement_of(found))


def show_labels(cfg: analyse.LabelsConfig) -> None:
    for path in analyse.run_label(cfg):
        print(f"\n{path}: {detection_of(plain(read(path, Labels)))}")


def show_steering(cfg: analyse.SteerConfig) -> None:
    paths = analyse.run_steer(cfg)
    print(f"\n{analyse.steering_table(paths)}\n")
    print(*paths)


def show_export(cfg: ExportConfig) -> None:
    print(run_export(cfg))


def show_conversion(cfg: ConvertConfig) -> None:
    print(*run_convert(cfg), sep="\n")


def show_report(cfg: analyse.ReportConfig) -> None:
    for path in analyse.run_beside(cfg):
        print(f"\n{path}: {nearness_of(plain(read(path, Beside))['layers'][-1])}")
    for run in cfg.runs():
        print(write_report(Path(run.output)))


def run_push(cfg: PushConfig) -> None:
    """Say what will be uploaded, and upload it once that is agreed to."""
    upload = gather(Path(cfg.run), cfg.repo)
    print(upload)
    if not cfg.yes:
        if not sys.stdin.isatty():
            raise ValueError("nothing was uploaded: say --yes where nobody can be asked")
        if input("Upload? [y/N] ").strip().lower() not in ("y", "yes"):
            raise ValueError("nothing was uploaded")
    print(f"\n{send(upload)}")


def show_graph(cfg: GraphConfig) -> None:
    traced = run_graph(cfg)
    page = write_graph_page(traced.path, traced.runs)
    graph, pruned = traced.graph, traced.pruned
    n_nodes = int(pruned.nodes.sum()) + len(graph.targets)
    shares = f"{pruned.through_units:.1%} of the target, {pruned.explained:.1%} of what nodes read"
    print(
        f"\n{len(traced.runs)} of {len(graph.layers)} MLPs have a layer; {graph.n_active:,} ",
        end="",
    )
    print(f"experts are active, {graph.n_units:,} of which are nodes")
    print(f"kept in {traced.seconds:.1f} s: {n_nodes:,} nodes, {int(pruned.edges.sum()):,} edges")
    print(f"from tokens by way of experts, and not from errors: {shares}")
    if traced.ablations is not None:
        print("rank correlation of predicted with measured effects:")
        for where, rank in traced.ablations.rank_correlation.items():
            print(f"  {where}: {'undefined' if rank is None else f'{rank:.2f}'}")
    print(f"\n{traced.path}  {page}")


def run_compare(cfg: ManyConfig) -> None:
    show_comparison(cfg, compare(cfg, measured=write_comparison_page))


def compare_with_workers(cfg: WorkersConfig, arguments: list[str]) -> None:
    """Compare in processes of their own, each of which reads the command's arguments where it is:
    Slurm's machines may have GPUs that this one has not."""
    if cfg.kept_activations is None:
        raise ValueError(
            "one process trains several MLPs' layers side by side, and leaves none to other "
            "--workers: name one of --layers, or keep --activations in a folder"
        )
    if Ranks.here().world > 1:
        raise ValueError("--workers are no ranks: start the command without torchrun")
    rows = run_workers(
        partial(work, [*arguments, "--workers", "1", "--executor", "local"]),
        Path(cfg.output) / "workers",
        cfg.workers,
        cfg.executor,
        own_gpu=cfg.device == "cuda" and cfg.llm_device is None,
    )
    show_comparison(cfg, rows)


def work(arguments: list[str]) -> list[dict[str, Any]]:
    """In a worker: the comparison's rows."""
    disable_progress_bar()
    return compare(make_parser().parse_args(arguments).cfg, measured=write_comparison_page)


def show_comparison(cfg: ManyConfig, rows: list[dict[str, Any]]) -> None:
    print(f"\n{comparison_table(rows)}\n")
    print(f"{cfg.output}/results.json  {cfg.output}/results.html")


def run_demo(cfg: DemoConfig) -> None:
    demo = CompareConfig(
        output=cfg.output,
        training_tokens=1_024_000,
        architectures=["mxd", "topk_transcoder", "dense"],
        k=[32],
        autocast=bfloat16_is_fast(),
        n_sequences=32,
    )
    rows = compare(demo, measured=write_comparison_page)
    print(f"\n{table(rows[0])}\n\n{comparison_table(rows)}\n")
    mxd = demo.runs()[0]
    contexts = {"effect_strength": 0.0, "sample_strength": 0.0, "n_tokens": 50_000}
    analyse.run_experts(analyse.ExpertsConfig(run=mxd.output, **contexts))
    write_comparison_page(Path(demo.output) / "results.json")
    print(f"{demo.output}/results.json  {demo.output}/results.html  {mxd.layer_path}")


COMMANDS = {
    "demo": (DemoConfig, run_demo),
    "train": (ManyConfig, run_train),
    "compare": (WorkersConfig, run_compare),
    "evaluate": (EvaluateConfig, run_evaluate),
    "finetune": (FinetuneConfig, show_finetuning),
    "probe": (analyse.ProbeConfig, show_probes),
    "experts": (analyse.ExpertsConfig, show_experts),
    "label": (analyse.LabelsConfig, show_labels),
    "steer": (analyse.SteerConfig, show_steering),
    "graph": (GraphConfig, show_graph),
    "report": (analyse.ReportConfig, show_report),
    "export": (ExportConfig, show_export),
    "convert": (ConvertConfig, show_conversion),
    "push": (PushConfig, run_push),
}
"""Configuration, whose docstring is the command's help, and what runs it."""


class Parser(ArgumentParser):
    """simple_parsing's, whose ``--config_path`` may also be the name of one of `CONFIGS`."""

    def set_defaults(self, config_path: str | Path | None = None, **kwargs: Any) -> None:
        """As simple_parsing's; ValueError if the file does not hold options of this command."""
        if config_path and (packaged := CONFIGS / f"{config_path}.yaml").exists():
            config_path = packaged
        try:
            super().set_defaults(config_path, **kwargs)
        except (RuntimeError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{config_path} is no configuration: {error}") from error


def make_parser() -> Parser:
    """The command line of all commands."""
    parser = Parser(prog="mxd-lens", description="Mixtures of Decoders.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (cfg_class, _) in COMMANDS.items():
        what, _, example = (cfg_class.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=what,
            description=f"{what} {example}",
            nested_mode=NestedMode.WITHOUT_ROOT,
            add_config_path_arg=issubclass(cfg_class, ManyConfig),
        )
        command.add_arguments(cfg_class, dest="cfg")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run a command; whatever the user can mend is one sentence and exit code 1."""
    disable_progress_bar()
    take_device()
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = int(os.environ.get("RANK", 0))
    silent = redirect_stdout(open(os.devnull, "w")) if rank else nullcontext()  # noqa: SIM115
    who = f"mxd-lens, rank {rank}" if rank else "mxd-lens"
    try:
        with startup.raise_on_signals(), silent:
            chosen = make_parser().parse_args(arguments)
            run, cfg = COMMANDS[chosen.command][1], chosen.cfg
            if isinstance(cfg, WorkersConfig) and (cfg.workers > 1 or cfg.executor == "slurm"):
                run = partial(compare_with_workers, arguments=arguments)
            run(cfg)
    except (ValueError, OSError, AssetError) as error:
        sys.exit(f"{who}: {' '.join(str(error).split())}")
    except RuntimeError as error:
        if (lost := lost_rank(error)) is None:
            raise
        print(f"{who}: {lost}", file=sys.stderr)  # at once: torchrun's SIGTERM is on its way
        sys.exit(1)
    except KeyboardInterrupt as error:
        said = str(error) or "interrupted; the same command goes on with what is not finished"
        print(f"\n{who}: {said}", file=sys.stderr)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
    finally:
        leave()


if __name__ == "__main__":
    import_module("mxd_lens.cli").main()  # workers know what they do by its module's name
