"""Set-ups that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor

from mxd_lens.data.activations import Reader, activations_store
from mxd_lens.files import write_json
from mxd_lens.layers.base import PairLayer
from mxd_lens.models.site import Site
from mxd_lens.ranks import Ranks
from mxd_lens.runs.analyse import (
    ExpertsConfig,
    ProbeConfig,
    SteerConfig,
    run_experts,
    run_probe,
    run_steer,
)
from mxd_lens.runs.config import COMPARISON_FILENAME
from mxd_lens.runs.results import VERSION
from tests.conftest import D_MLP, D_MODEL, TINY_RUN, randomise

HOOK_IN, HOOK_OUT = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"
"""Of layer 1 of a tiny bridge."""

STORE = {"context_size": 8, "batch_size": 32, "lm_batch_size": 4}
STORE |= {"autocast_lm": False}
"""Arguments of `activations_store` for a tiny model."""


def open_reader(
    sites: list[Site], documents: Any, needs: Any = None, ranks: Ranks | None = None, **options: Any
) -> Reader:
    """Of the text at some MLPs of a tiny model."""
    store = activations_store(sites, documents, **STORE | options)
    dtype = torch.bfloat16 if store.autocast_lm else torch.float32
    needs = needs or [[site.layer for site in sites]]
    return Reader(store, sites, needs, device="cpu", dtype=dtype, ranks=ranks or Ranks())


CE = ("ce_original", "ce_replaced", "ce_replaced_all_positions", "ce_zero_ablation", "ce_increase")
GATE = ("ce_mean_gate", "ce_shuffled_gate", "ce_shuffled_gate_matched")
BIN = {"low": 100, "high": 1000, "tokens": 64, "nmse": 0.05, "ce_increase": 0.0625}
BIN |= {"gate_at_mean": 0.0625, "mlp_removed": 0.5}
ROW: dict[str, Any] = {
    **{"architecture": "mxd", "seed": 0, "lr": 3e-3, "dataset": "tiny (held out)", "k": 3},
    **{"d_sae": 12, "d_hidden": 32, "n_parameters": 1000, "training_tokens": 1280},
    **{"model_name": "tiny", "hook_layer": 1, "hook_name": HOOK_IN, "hook_name_out": HOOK_OUT},
    **dict(zip(CE, (3.0, 3.0625, 3.0625, 3.5, 0.0625), strict=True)),
    **dict(zip(GATE, (3.125, 3.25, 3.1875), strict=True)),
    **{"ce_recovered": 0.875, "ce_tokens": 64, "heldout_tokens": 64, "kl": 0.01, "fvu": 0.04},
    **{"nmse": 0.05, "nmse_median": 0.04, "l0": 3.0, "alive_fraction": 0.75, "always_on": 0},
    **{
        "experts_cosine": 0.5,
        "ce_increase_interval": [0.05, 0.07],
        "ce_floor": 0.0,
        "share": 0.125,
    },
    **{"share_interval": [0.1, 0.2], "kl_interval": [0.005, 0.02], "kl_floor": 0.0},
    **{"jacobian_cosine": 0.875, "jacobian_cosine_median": 0.9},
    **{"jacobian_gate_share": 0.01, "jacobian_gate_cosine": 0.25},
    **{"by_frequency": [BIN], "by_position": [BIN | {"low": 0, "high": 8}]},
    "sequences": {"tokens": [32, 32], "ce_original": [90.0, 102.0], "ce_replaced": [92.0, 104.0]},
}
"""A layer's results, as `mxd_lens.runs.results.Row` has them."""


def placed(layer: SAE[Any], model: Any, block: int = 1) -> SAE[Any]:
    """The layer, with metadata as if trained in place of the MLP of the model's block."""
    metadata = layer.cfg.metadata
    metadata.hook_name, metadata.hook_name_out = Site.at(model, block).hooks
    metadata.context_size = 8
    return layer


ANALYSES = {
    "probe": (run_probe, ProbeConfig),
    "experts": (run_experts, ExpertsConfig),
    "steering": (run_steer, SteerConfig),
}
"""Of finished runs: by the stem of their file, the analysis and its configuration."""


def letters(texts: list[str], **_: Any) -> torch.Tensor:
    """Sentence embeddings without a model: how often each letter occurs."""
    counts = [[text.count(letter) + 1 for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
    return torch.nn.functional.normalize(torch.tensor(counts, dtype=torch.float32), dim=-1)


def write_run(
    folder: Path, architecture: str = "mxd", k: int = 3, seed: int = 0, **files: Any
) -> Path:
    """The folder of a run: configurations, faithfulness, and other results by their file's stem."""
    what = {"architecture": architecture, "k": k}
    (folder / "layer").mkdir(parents=True)
    write_json(folder / "runner_cfg.json", TINY_RUN | what | {"seed": seed})
    write_json(folder / "layer" / "cfg.json", what | {"d_sae": ROW["d_sae"]})
    for stem, value in ({"results": ROW | what | {"seed": seed}} | files).items():
        write_json(folder / f"{stem}.json", {"version": VERSION} | value)
    return folder


def write_comparison(folder: Path, *rows: dict[str, Any]) -> Path:
    """The results of a comparison of such layers."""
    write_json(folder / COMPARISON_FILENAME, {})
    results = {"version": VERSION, "rows": [ROW | row for row in rows]}
    write_json(folder / "results.json", results)
    return folder / "results.json"


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
close32 = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
same = partial(torch.testing.assert_close, rtol=0, atol=0)
"""Bit by bit."""

SHAPE = {"d_in": 5, "d_out": 4, "d_hidden": 7, "d_sae": 11, "k": 3, "dtype": "float64"}
SHAPE |= {"rank": 2}
MODEL_SHAPE = {"d_in": D_MODEL, "d_out": D_MODEL, "d_hidden": D_MLP, "d_sae": 40, "k": 4}
MODEL_SHAPE |= {"rank": 3, "dtype": "float32"}  # fits the tiny models


def _kinds(registry: dict, prefix: str) -> dict[str, tuple[type, type, dict[str, Any]]]:
    ours = {
        name: classes
        for name, classes in registry.items()
        if issubclass(classes[0], PairLayer) and classes[0].__module__.startswith("mxd_lens.")
    }
    mlp = {"gated": False, "act_fn": "gelu"}
    kinds = {f"{prefix}{name}": (*classes, {}) for name, classes in ours.items()}
    return kinds | {
        f"{prefix}{name}_mlp": (*ours[name], mlp) for name in ("mxd", "mxd_paper") if name in ours
    }


INFERENCE = _kinds(SAE_CLASS_REGISTRY, "")
TRAINING = _kinds(SAE_TRAINING_CLASS_REGISTRY, "training_")
KINDS = INFERENCE | TRAINING
"""Layers of this package by name: class, configuration class and fields of its own."""
SPARSE = [kind for kind in KINDS if "dense" not in kind]
RAGGED = [kind for kind in SPARSE if "batchtopk" in kind or "jumprelu" in kind]
TOPK = [kind for kind in SPARSE if kind not in RAGGED]


def make_config(kind: str, **options: Any) -> Any:
    """A layer's configuration; options that it has not are left out."""
    _, cfg_class, own = KINDS[kind]
    known = {field.name for field in fields(cfg_class)}
    options = SHAPE | own | options
    return cfg_class(**{name: value for name, value in options.items() if name in known})


@torch.no_grad()
def make_layer(kind: str, size: float = 0.7, **options: Any) -> Any:
    """A layer with no parameter at zero or one."""
    layer = KINDS[kind][0](make_config(kind, **options))
    randomise(layer, size)
    if hasattr(layer, "gate_mean"):
        layer.gate_mean.normal_()
        layer.b_enc.zero_()
    if hasattr(layer, "threshold"):
        layer.threshold.fill_(0.2)
    if isinstance(layer, TrainingSAE):
        layer.normalize_decoder()
    return layer


def training_step(layer: Any, x: Tensor, y: Tensor, dead: Tensor | None = None) -> TrainStepOutput:
    """A step of an input-to-output layer."""
    pairs = torch.cat([x, y], dim=-1)
    return layer.training_forward_pass(TrainStepInput(pairs, {}, dead, 0, False))


def substituted(
    lm: Any,
    tokens: Tensor,
    layers: dict[tuple[str, str], Any],
    output: Callable[[Tensor, Any, Tensor], Tensor] = lambda y, layer, x: layer(x),
) -> Tensor:
    """Logits with ``output(MLP's output, layer, MLP's input)`` for the MLP's, by hooks alone.

    Args:
        layers: by names of the MLP's hooks.
    """
    hooks, seen = [], {}
    for (hook_in, hook_out), layer in layers.items():

        def read(x: Tensor, hook: Any, at: str = hook_in) -> None:
            seen[at] = x

        def write(y: Tensor, hook: Any, at: str = hook_in, layer: Any = layer) -> Tensor:
            return output(y, layer, seen[at])

        hooks += [(hook_in, read), (hook_out, write)]
    return lm.run_with_hooks(tokens, fwd_hooks=hooks)


def random_layer(architecture: str, model: Any = None, size: float = 0.5, **options: Any) -> SAE:
    """A random layer for MLP 1 of a tiny model (a bridge's, by default)."""
    cls, cfg_class = SAE_CLASS_REGISTRY[architecture]
    known = {field.name for field in fields(cfg_class)}
    hook_out = "blocks.1.mlp.hook_out" if model is None else Site.at(model, 1).hook_out
    metadata = SAEMetadata(
        model_name="tiny",
        hook_name=HOOK_IN if "d_out" in known else hook_out,
        hook_name_out=hook_out,
        context_size=8,
    )
    shape = {"d_in": D_MODEL, "d_out": D_MODEL, "d_hidden": D_MLP, "d_sae": 40, "k": 4}
    shape |= {
        "rank": 3,
        "apply_b_dec_to_input": "d_out" not in known,
        "metadata": metadata,
    } | options
    layer = cls(cfg_class(**{name: value for name, value in shape.items() if name in known}))
    randomise(layer, size)
    return layer


class BesideBos(torch.nn.Module):
    """A layer in place of an MLP everywhere but at the first token."""

    def __init__(self, layer: Any, mlp: torch.nn.Module):
        super().__init__()
        self.layer, self.mlp = layer, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.mlp(x[:, :1]), self.layer(x[:, 1:])], dim=1)
