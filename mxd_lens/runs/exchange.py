"""Layers to and from other tools: what a run or comparison has, into a folder of theirs, and the
layers in their files, into folders of SAELens'."""

from __future__ import annotations

from pathlib import Path

from simple_parsing import field as argument

from mxd_lens.fields import Name, PathStr, config
from mxd_lens.files import check_new, whole
from mxd_lens.formats import read_layers
from mxd_lens.formats.circuit_tracer import write_circuit_tracer
from mxd_lens.models.load import ModelClass
from mxd_lens.runs.replacement import Choice, chosen_runs
from mxd_lens.runs.results import load_layer


@config
class ExportConfig(Choice):
    """Write transcoders of all MLPs into a folder that circuit-tracer reads.

    Example: mxd-lens export runs/all --architecture topk_transcoder --output gpt2-transcoders
    """

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train` or `compare` with a transcoder for every MLP."""
    output: PathStr
    """Folder of config.yaml and layer_0.safetensors, layer_1.safetensors, ...; a new one."""


@config
class ConvertConfig:
    """Save layers that circuit-tracer, sparsify or the MxD paper's code have saved as SAELens does.

    Example: mxd-lens convert checkpoints/my-transcoders --output layers
    """

    path: PathStr = argument(positional=True, metavar="PATH")
    """A folder of circuit-tracer's or sparsify's, or a .pt file of the paper's code."""
    output: PathStr
    """Folder of layer0, layer1, ..., which SAE.load_from_disk loads; a new one."""
    model: Name | None = None
    """Name of the language model, where PATH does not say or names it otherwise."""
    model_class: ModelClass = "TransformerBridge"
    """How TransformerLens wraps the model."""


def run_export(cfg: ExportConfig) -> Path:
    """Export the layers of a folder; it returns the new one, and raises as `chosen_runs` and
    `write_circuit_tracer` do."""
    runs = chosen_runs(cfg.run, **cfg.chosen)
    layers = {run.layer: load_layer(run.layer_path) for run in runs}
    write_circuit_tracer(cfg.output, layers)
    return Path(cfg.output)


def run_convert(cfg: ConvertConfig) -> list[Path]:
    """Convert the layers in a path; it returns their folders, and raises as `read_layers` does, and
    ValueError for an output folder with something in it."""
    output = Path(cfg.output)
    check_new(output)
    layers = read_layers(cfg.path, cfg.model, cfg.model_class)
    with whole(output) as unfinished:
        for number, layer in sorted(layers.items()):
            layer.save_model(unfinished / f"layer{number}")
    return [output / f"layer{number}" for number in sorted(layers)]
