"""The files of a run, as they are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE
from typing_extensions import NotRequired, TypedDict

from mxd_lens.files import read_json


class LayerFile(TypedDict):
    """cfg.json of a layer: SAELens'."""

    architecture: str
    d_sae: int
    k: NotRequired[float]


class Row(TypedDict):
    """results.json of a run: what `evaluate` has measured, and other fields."""

    name: NotRequired[str]
    seed: NotRequired[int]
    dataset: str
    architecture: str
    model_name: str | None
    hook_name: str
    hook_name_out: str
    k: float | None
    d_sae: int
    n_parameters: int
    ce_original: float
    ce_replaced: float
    ce_mean_gate: float
    ce_shuffled_gate: float
    ce_shuffled_gate_matched: float
    ce_zero_ablation: float
    ce_increase: float
    ce_recovered: float
    kl: float
    nmse: float
    fvu: float
    l0: float
    alive_fraction: float
    always_on: int


class ComparedRow(Row):
    """results.json of a run within a comparison."""

    name: str
    seed: int


class ProbeFile(TypedDict):
    """probe.json, see `mxd_lens.runs.analyse.run_probe`."""

    datasets: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]


class ExpertsFile(TypedDict):
    """experts.json, see `mxd_lens.analysis.experts.report.inspect_experts`."""

    dataset: str
    n_tokens: int
    d_sae: int
    n_live: int
    rule: str
    texts: list[list[str]]
    experts: list[dict[str, Any]]
    asked: NotRequired[dict[str, Any]]


class SteeringFile(TypedDict):
    """steering.json, see `mxd_lens.analysis.steering.evaluate_steering`."""

    edit: str
    prompt: str
    n_samples: int
    n_tokens: int
    temperature: float
    seed: int
    unsteered: dict[str, float]
    rows: list[dict[str, Any]]


def load_layer(folder: Path, device: str = "cpu") -> SAE[Any]:
    """A trained layer that SAELens has saved.

    Raises:
        ValueError: its files cannot be read, or do not fit together.
    """
    read_json(folder / SAE_CFG_FILENAME, LayerFile)
    try:
        layer: Any = SAE.load_from_disk(folder)
    except Exception as error:  # safetensors, PyTorch and SAELens have kinds of their own
        raise ValueError(
            f"{folder / SAE_WEIGHTS_FILENAME} does not hold the weights of the layer that "
            f"{SAE_CFG_FILENAME} beside it describes ({type(error).__name__}: {error}): restore "
            "it, or delete that folder and train the layer again"
        ) from error
    return layer.to(device)
