"""The results of runs, typed: what each file holds, and the one way to write and read it.

Every file names the `VERSION` of its form. `read` gives typed rows, `plain` the same as
dictionaries, ready for tables and JSON::

    row = read(Path("runs/demo/layer6-mxd-k32-seed0/results.json"), Row)
    rows = read_rows(Path("runs/demo/results.json"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE
from typing_extensions import NotRequired, TypedDict, dataclass_transform

from mxd_lens.files import check_same, read_json, write_json

VERSION = 3
"""Of the form of all these files."""

T = TypeVar("T")
Number = int | float
Parts = dict[Any, dict[str, Any]]
"""What a file is made of, and with which settings."""


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def result(cls: type[T]) -> type[T]:
    """Make a dataclass, of keyword arguments, that checks and converts what it is made of."""
    made: Any = dataclass(kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    return made


@result
class Bin:
    """Tokens whose frequency or position is from ``low`` on and below ``high``, see `InModel`."""

    low: int
    high: int
    tokens: int
    nmse: float
    ce_increase: float
    gate_at_mean: float | None
    mlp_removed: float


Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


@result
class Row:
    """results.json of a run: what `evaluate` measures of its layer, None what that lacks.

    Fields with a default are left out of the file where they have it.
    """

    architecture: str
    seed: int
    lr: float
    dataset: str
    k: Number | None
    d_sae: int
    d_hidden: int | None
    n_parameters: int
    training_tokens: int | None
    model_name: str | None
    hook_layer: int
    hook_name: str
    hook_name_out: str
    ce_original: float
    ce_replaced: float
    ce_replaced_all_positions: float
    ce_zero_ablation: float
    ce_increase: float
    ce_increase_interval: Interval | None
    ce_floor: float
    ce_recovered: float
    ce_mean_gate: float | None
    ce_shuffled_gate: float | None
    ce_shuffled_gate_matched: float | None
    share: float | None
    share_interval: Interval | None
    ce_tokens: int
    kl: float
    kl_interval: Interval | None
    kl_floor: float
    fvu: float
    nmse: float
    nmse_median: float
    heldout_tokens: int
    l0: float | None
    alive_fraction: float | None
    always_on: int | None
    experts_cosine: float | None
    jacobian_cosine: float
    jacobian_cosine_median: float
    jacobian_gate_share: float | None
    jacobian_gate_cosine: float | None
    by_frequency: list[Bin]
    by_position: list[Bin]
    sequences: dict[str, list[float]]
    worth: float | None = None
    worth_interval: Interval | None = None
    probe: str | None = None
    probe_f1_top1: float | None = None
    probe_f1_top2: float | None = None
    probe_f1_top5: float | None = None

    def parts(self) -> Parts:
        made: Parts = {"measurements": {}}
        return made | ({self.probe: {}} if self.probe else {})


@result
class Comparison:
    """results.json of a comparison: a row for each of its layers."""

    rows: Annotated[list[Row], Field(min_length=1)]


@result
class Replaced:
    """So many layers in place of their MLPs at once, see `evaluate_jointly`."""

    layers: list[int]
    ce_increase: float
    ce_increase_interval: Interval | None
    kl: float
    kl_interval: Interval | None


@result
class Continuation:
    """What the model writes after a prompt, with all layers in place and without, see
    `mxd_lens.analysis.joint.continuations`."""

    prompt: str
    original: str
    replaced: str


@result
class InPlace:
    """One of the layers that are in place together, see `evaluate_jointly`; the last are None where
    each was not asked for, or has none."""

    layer: int
    fvu: float
    nmse: float
    nmse_median: float
    heldout_tokens: int
    l0: float | None
    alive_fraction: float | None
    always_on: int | None
    experts_cosine: float | None
    ce_increase: float | None = None
    ce_increase_interval: Interval | None = None
    share: float | None = None
    shuffled: float | None = None
    jacobian_cosine: float | None = None
    worth: float | None = None
    worth_interval: Interval | None = None


@result
class JointRow:
    """Layers of one architecture, k and seed, put in place together, see `evaluate_jointly`."""

    architecture: str
    k: Number | None
    seed: int
    model_name: str
    dataset: str
    ce_original: float
    ce_tokens: int
    replaced: Annotated[list[Replaced], Field(min_length=1)]
    error: list[float]
    ce_mean_gates: float | None
    ce_zero_ablation: float
    share: float | None
    in_place: list[InPlace]
    continuations: list[Continuation]


@result
class Joint:
    """joint.json of a comparison of several MLPs."""

    rows: Annotated[list[JointRow], Field(min_length=1)]


@result
class Ablation:
    """An expert ablated at one position: the target's change that the graph predicts, and what
    happens, see `mxd_lens.analysis.graphs.interventions.Where`."""

    layer: int
    unit: int
    position: int
    predicted: float
    errors: float
    replacement: float
    original: float


@result
class Ablations:
    """ablations-<slug>.json of a graph; Spearman's correlations of predicted with measured."""

    target: str
    rank_correlation: dict[str, float | None]
    rows: Annotated[list[Ablation], Field(min_length=1)]


@result
class ProbeMeans:
    """Mean scores, over classes and splits, of probes on ``n_features`` features (None: all) of
    the layer that ``architecture``, ``k`` and ``run_seed`` name, of the MLP's ``neurons``, or of
    the ``majority`` guess."""

    data: str
    architecture: str
    k: Number | None
    run_seed: int | None
    n_features: int | None
    accuracy: float
    balanced_accuracy: float
    f1: float
    roc_auc: float


@result
class ProbeRow(ProbeMeans):
    """One probe, see `probe`."""

    class_: str = Field(alias="class")
    features: list[int] | None
    n_train: int
    n_test: int
    test_size: float
    seed: int


@result
class ProbedData:
    """How a labelled text was asked for, and its classes."""

    asked: dict[str, Any]
    classes: list[str]


@result
class Probes:
    """probe.json, see `mxd_lens.runs.analyse.run_probe`."""

    datasets: dict[str, ProbedData]
    rows: list[ProbeRow]
    summary: list[ProbeMeans]

    def parts(self) -> Parts:
        return {data: probed.asked for data, probed in self.datasets.items()}


@result
class Context:
    """A place where an expert fires: text, position in it, activation, quantile of that."""

    text: int
    position: int
    value: float
    quantile: float


@result
class Expert:
    """An expert, see `inspect_experts`."""

    id: int
    name: str
    density: float
    mean: float
    max: float
    histogram: list[int]
    contexts: list[Context]
    coherence: float | None
    same_token: float
    meaningful: bool
    promoted: list[list[Any]] | None
    suppressed: list[list[Any]] | None
    agreement: float | None
    nearest: list[list[Any]]
    coactive: list[list[Any]]
    rank: int
    effective_rank: float
    sample: str | None


@result
class Experts:
    """experts.json, see `inspect_experts`; ``asked``: the settings of its parts, ``contexts``,
    ``effects`` and ``samples``."""

    asked: dict[str, dict[str, Any]]
    model_name: str | None
    hook_name: str
    hook_name_out: str
    architecture: str
    k: Number | None
    d_sae: int
    dataset: str
    n_tokens: int
    n_live: int
    rule: str
    texts: list[list[str]]
    experts: list[Expert]

    def parts(self) -> Parts:
        made = {**self.asked}
        if "samples" in made:
            made["samples"] = {"top_p": None} | made["samples"]
        return made

    @property
    def text(self) -> dict[str, Any]:
        """Which text they fired on, read by which model."""
        return {name: getattr(self, name) for name in ("model_name", "dataset", "n_tokens")}


@result
class Nearest:
    """The experts of another layer that are most often active on the same tokens as an expert, ids
    and Jaccard indices, see `coactive`."""

    id: int
    nearest: list[tuple[int, float]]


@result
class OtherLayer:
    """A layer whose experts are beside a run's: the run's folder, from the one that this is in,
    the layer in words, the ``text`` that both read, and means of the experts' best Jaccard index,
    measured and by chance, see `coactive_by_chance`."""

    run: str
    label: str
    text: dict[str, Any]
    jaccard: float
    jaccard_by_chance: float
    experts: list[Nearest]


@result
class Beside:
    """beside.json, see `mxd_lens.runs.analyse.run_beside`: of the layers, the last is the one that
    was asked for last, which the report shows."""

    layers: Annotated[list[OtherLayer], Field(min_length=1)]

    def parts(self) -> Parts:
        return {layer.run: layer.text for layer in self.layers}


@result
class Label:
    """A name of an expert, and how well it tells held-out contexts, see `detection`; so does the
    name of the expert ``shuffled``. ``n_contexts`` is None until that has been judged, and 0 where
    there are none; ``unanswered``: of the contexts, with either name."""

    id: int
    name: str
    shuffled: int | None
    n_contexts: int | None
    f1: float | None
    accuracy: float | None
    f1_shuffled: float | None
    accuracy_shuffled: float | None
    unanswered: int


@result
class Labels:
    """labels.json, see `mxd_lens.runs.analyse.run_label`; ``namer``, ``judge``: in words."""

    asked: dict[str, Any]
    namer: str
    judge: str
    n_tokens: int
    labels: list[Label]

    def parts(self) -> Parts:
        judged = [label for label in self.labels if label.n_contexts is not None]
        return {"settings": self.asked} | {label.id: {} for label in judged}


@result
class SteeringRow:
    """Samples of one unit, steered at one strength, see `evaluate_steering`."""

    architecture: str
    expert: int
    strength: float
    amount: float
    coherence: float
    perplexity: float
    samples: list[str]


@result
class Steering:
    """steering.json, see `evaluate_steering`.

    Fields with a default are left out of the file where they have it.
    """

    edit: str
    prompt: str
    n_samples: int
    n_tokens: int
    temperature: float
    seed: int
    unsteered: dict[str, float]
    rows: list[SteeringRow]
    top_p: float | None = None

    def parts(self) -> Parts:
        settings = plain(self) | {"top_p": self.top_p}
        del settings["unsteered"], settings["rows"]
        return {"settings": settings} | {(row.expert, row.strength): {} for row in self.rows}


def read(path: Path, kind: type[T]) -> T | None:
    """What a results file holds; None if there is none, ValueError if it is of another version,
    damaged, or none of ours."""

    def unversioned(value: Any) -> Any:
        if isinstance(value, dict) and (version := value.pop("version", None)) != VERSION:
            raise ValueError(f"version={version}, this mxd-lens reads {VERSION}")
        return value

    return read_json(path, Annotated[kind, BeforeValidator(unversioned)])


def write(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a results file, whole or not at all."""
    write_json(path, {"version": VERSION} | plain(value), indent)


def plain(value: Any) -> dict[str, Any]:
    """A result as dictionaries and lists, with the names that its file has."""
    return TypeAdapter(type(value)).dump_python(value, by_alias=True, exclude_defaults=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Plain rows of a results.json, see `read`: a run's or a comparison's; none without a file."""
    found: Any = read(path, Comparison | Row)  # type: ignore[arg-type]
    if found is None:
        return []
    return [plain(row) for row in (found.rows if isinstance(found, Comparison) else [found])]


class ResultsFile(Generic[T]):
    """A results file: what it holds, and which parts are missing that are asked for, each with the
    settings to make it with; ValueError if one is there that was made with others."""

    def __init__(self, path: Path, kind: type[T], asked: Parts):
        self.path = path
        self.value: Any = read(path, kind)
        made: Parts = {} if self.value is None else self.value.parts()
        self.missing: list[Any] = [part for part in asked if part not in made]
        for part in asked:
            if part in made:
                check_same(path, made[part], asked[part])

    def save(self, value: T, indent: int | None = None) -> None:
        write(self.path, value, indent)
        self.value = value


class LayerFile(TypedDict):
    """cfg.json of a layer: SAELens'."""

    architecture: str
    d_sae: int
    k: NotRequired[float]


def read_layer_file(folder: Path) -> LayerFile:
    """The configuration of the layer in a folder; ValueError if there is none."""
    path = folder / SAE_CFG_FILENAME
    found = read_json(path, LayerFile)
    if found is None:
        raise ValueError(f"there is no {path}: delete that folder and train the layer again")
    return found


def load_layer(folder: Path, device: str = "cpu") -> SAE[Any]:
    """A trained layer; ValueError if its files cannot be read, or do not fit together."""
    read_layer_file(folder)
    try:
        layer: Any = SAE.load_from_disk(folder)
    except Exception as error:  # safetensors, PyTorch and SAELens have kinds of their own
        raise ValueError(
            f"{folder / SAE_WEIGHTS_FILENAME} does not hold the weights of the layer that "
            f"{SAE_CFG_FILENAME} beside it describes ({type(error).__name__}: {error}): restore "
            "it, or delete that folder and train the layer again"
        ) from error
    return layer.to(device)
