"""circuit-tracer's folders: a transcoder for every MLP of a model, from 0 on.

``config.yaml`` and ``layer_0.safetensors``, ``layer_1.safetensors``, ..., as
`circuit_tracer/transcoder/single_layer_transcoder.py` and `circuit_tracer/utils/hf_utils.py` of
github.com/decoderesearch/circuit-tracer read them::

    a = activation(x W_enc^T + b_enc)            W_enc [features, d_model], b_enc [features]
    y = a W_dec + b_dec + x W_skip^T             W_dec [features, d_model], b_dec [d_model]

W_skip [d_model, d_model] may be missing. Activations: ReLU; JumpReLU, ``v (v > threshold)``, where
a file has ``activation_function.threshold`` [features]; and, where config.yaml says ``activation:
topk`` and ``k``, the k largest, of which negative ones stay negative. The weights of the language
model are not processed there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from sae_lens.saes.sae import SAE, TrainingSAE
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from mxd_lens.fields import Count, sentence
from mxd_lens.files import check_new, whole
from mxd_lens.formats.foreign import build, of_mlp, read_tensors
from mxd_lens.layers import layer_of
from mxd_lens.models.load import ModelClass

CONFIG_FILENAME = "config.yaml"
THRESHOLD = "activation_function.threshold"

_ACTIVATIONS = {
    "topk_transcoder": "topk",
    "topk_skip_transcoder": "topk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""Of the architectures that the format can hold."""
_ARCHITECTURES = {(activation, "skip" in name): name for name, activation in _ACTIVATIONS.items()}


class Config(TypedDict):
    """config.yaml; circuit-tracer ignores what else is there."""

    model_kind: Literal["transcoder_set"]
    feature_input_hook: str
    feature_output_hook: str
    model_name: NotRequired[str]
    activation: NotRequired[str]
    k: NotRequired[Count]


def write_circuit_tracer(folder: str | Path, layers: Mapping[int, SAE[Any]]) -> None:
    """Write transcoders for circuit-tracer, whole or not at all.

    A top-k transcoder gets k features more, the last ones, which are always zero: circuit-tracer
    would fill up the k largest with negative pre-activations, where fewer than k are positive.

    Args:
        folder: one that is empty, or not there.
        layers: by MLP, one for every MLP of the model: TopK, ReLU or JumpReLU transcoders, with or
            without a skip; in training or not.

    Raises:
        ValueError: no such layers, of unequal kind, k or width, or for unequal models; or a folder
            with something in it.
        OSError: see `mxd_lens.files.whole`.
    """
    folder = Path(folder)
    check_new(folder)
    config = _shared_config(layers)
    with whole(folder) as unfinished:
        unfinished.mkdir()
        for number, layer in sorted(layers.items()):
            tensors = _tensors(layer, config.get("k", 0))
            save_file(tensors, unfinished / f"layer_{number}.safetensors")
        text = yaml.safe_dump(dict(config), sort_keys=False)
        (unfinished / CONFIG_FILENAME).write_text(text, encoding="utf-8")


def _shared_config(layers: Mapping[int, SAE[Any]]) -> Config:
    """What the layers have in common; ValueError if it is not enough."""
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ValueError(
            f"circuit-tracer needs a layer for every MLP from 0 on, got {sorted(layers)}: train "
            "with --layers all"
        )
    kinds = {}
    for number, layer in sorted(layers.items()):
        activation, cfg = _activation(number, layer), layer.cfg
        _check_place(number, layer)
        k = cfg.k if activation == "topk" else None
        kinds[number] = (activation, k, cfg.d_sae, cfg.metadata.model_name)
    if len({*kinds.values()}) > 1:
        other = next(number for number in kinds if kinds[number] != kinds[0])
        raise ValueError(
            "circuit-tracer takes layers of one kind, k, width and model only, and (activation, k, "
            f"d_sae, model) is {kinds[0]} for layer 0 and {kinds[other]} for layer {other}: choose "
            "among them by architecture and k, or train them alike"
        )
    activation, k, _, model_name = kinds[0]
    config: Config = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "activation": activation,
    }
    if k is not None:
        config["k"] = k
    if model_name is not None:
        config["model_name"] = model_name
    return config


def _check_place(number: int, layer: SAE[Any]) -> None:
    metadata = layer.cfg.metadata
    reads, writes = metadata.hook_name, metadata.hook_name_out
    outputs = (None, f"blocks.{number}.mlp.hook_out", f"blocks.{number}.hook_mlp_out")
    if reads not in (None, f"blocks.{number}.mlp.hook_in") or writes not in outputs:
        raise ValueError(
            f"layer {number} reads {reads} and writes {writes}, not MLP {number}'s input and output"
        )
    if layer.cfg.d_in != layer.cfg.d_out:
        raise ValueError(
            f"layer {number} has d_in={layer.cfg.d_in} and d_out={layer.cfg.d_out}: "
            "circuit-tracer's have one width, the model's"
        )
    if metadata.norms_folded:
        raise ValueError(
            f"layer {number} was trained on a model with its norms folded in, and circuit-tracer "
            "does not fold them: train it on the model as load_model loads it"
        )


def _activation(number: int, layer: Any) -> str:
    """Which one a layer has; ValueError for a layer that is no transcoder."""
    label = layer_of(layer).label
    name = layer.cfg.architecture()
    if isinstance(layer, TrainingSAE):  # what it is saved as
        name = layer.cfg.get_inference_config_class().architecture()
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"layer {number} is no transcoder but has architecture {name} ({label}), for which "
            "circuit-tracer's format has no place: export topk_transcoder, topk_skip_transcoder or "
            "batchtopk_transcoder"
        )
    if layer.cfg.normalize_activations != "none" or layer.cfg.reshape_activations != "none":
        raise ValueError(
            f"layer {number} normalizes or reshapes its inputs, circuit-tracer does not"
        )
    return _ACTIVATIONS[name]


@torch.no_grad()
def _tensors(sae: SAE[Any], n_zero: int) -> dict[str, Tensor]:
    """A layer's file, with n_zero features that are always zero after its own."""
    layer: Any = sae
    if isinstance(sae, TrainingSAE):
        layer = layer.to_inference()
    weights = {name: weight.detach().cpu() for name, weight in layer.state_dict().items()}
    threshold = weights.pop("threshold", None)
    weights["W_enc"] = weights["W_enc"].T
    for name in ("W_enc", "W_dec", "b_enc"):
        weight = weights[name]
        zero = weight.new_zeros(n_zero, *weight.shape[1:])
        weights[name] = torch.cat([weight, zero])
    if threshold is not None:
        weights[THRESHOLD] = threshold.clamp_min(0)  # a ReLU comes before it here
    return {name: weight.contiguous() for name, weight in weights.items()}


def read_circuit_tracer(
    folder: str | Path,
    model_name: str | None = None,
    model_class: ModelClass = "TransformerBridge",
) -> dict[int, SAE[Any]]:
    """The transcoders in a folder as circuit-tracer has them on the hub, by MLP.

    Args:
        folder: with ``layer_i.safetensors`` in it: a download of such a repository, or what
            `write_circuit_tracer` has written, whose layers come back to the bit.
        model_name, model_class: see `mxd_lens.formats.read_layers`.

    Returns:
        ``topk_transcoder``, ``transcoder`` or ``jumprelu_transcoder``, or the same with a skip. In
        a top-k transcoder that is not of `write_circuit_tracer`, negative pre-activations among the
        k largest become zero, of which a warning tells: it is the same wherever k are positive.

    Raises:
        ValueError: files that are missing, damaged, or of another format; features that read or
            write elsewhere than at the MLP; a negative threshold, which a ReLU would hide.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILENAME
    config = _read_config(path)
    model_name = model_name or config.get("model_name")
    _check_hooks(path, config, model_name)
    n_layers = len(list(folder.glob("layer_*.safetensors")))
    if not n_layers:
        raise ValueError(f"{folder} has no layer_0.safetensors: fetch the weights beside {path}")
    return {
        number: _read_layer(
            folder / f"layer_{number}.safetensors",
            of_mlp(number, model_name, model_class),
            config.get("activation"),
            config.get("k"),
        )
        for number in range(n_layers)
    }


def _read_config(path: Path) -> Config:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = TypeAdapter(Config).validate_python(found)
    except ValidationError as error:
        said = sentence(error.errors()[:1])
        raise ValueError(f"{path} is no config.yaml of transcoders ({said})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no config.yaml of circuit-tracer ({error})") from error
    if config.get("activation") == "topk" and "k" not in config:
        raise ValueError(f"{path} says activation: topk, and no k: add the k of these transcoders")
    return config


def _check_hooks(path: Path, config: Config, model_name: str | None) -> None:
    reads, writes = config["feature_input_hook"], config["feature_output_hook"]
    # There, hook_mlp_out comes after the norm that follows the MLP.
    normed = writes == "hook_mlp_out" and re.search(r"gemma-?[23]", model_name or "", re.IGNORECASE)
    if reads != "mlp.hook_in" or writes not in ("mlp.hook_out", "hook_mlp_out") or normed:
        of = f" of {model_name}" if normed else ""
        raise ValueError(
            f"{path}: these features read {reads} and write {writes}{of}, and stand for more than "
            "the MLP: a layer here reads mlp.hook_in and writes mlp.hook_out"
        )


def _read_layer(path: Path, metadata: Any, activation: str | None, k: int | None) -> SAE[Any]:
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    by_weights = activation not in ("topk", "relu")
    weights = read_tensors(path, names, ("W_skip", *([THRESHOLD] if by_weights else [])))
    options = {}
    threshold = weights.pop(THRESHOLD, None)
    if activation == "topk" and k is not None:
        options["k"] = k
        _take_zeros(path, weights, k)
    elif threshold is not None:
        activation = "jumprelu"
        if (threshold < 0).any():
            raise ValueError(f"{path} has negative thresholds, below which a layer here is zero")
        weights["threshold"] = threshold
    else:
        activation = "relu"
    weights["W_enc"] = weights["W_enc"].mT if weights["W_enc"].ndim > 1 else weights["W_enc"]
    architecture = _ARCHITECTURES[activation, "W_skip" in weights]
    return build(path, architecture, weights, metadata, **options)


def _take_zeros(path: Path, weights: dict[str, Tensor], k: int) -> None:
    """Take away the features of `_tensors` that are always zero, or warn that there are none."""
    padded = ("W_enc", "b_enc", "W_dec")
    if any(len(weights[name]) <= k or weights[name][-k:].any() for name in padded):
        warnings.warn(
            f"{path}: negative pre-activations among the k={k} largest, which circuit-tracer "
            "keeps, are zero here",
            stacklevel=2,
        )
        return
    for name in padded:
        weights[name] = weights[name][:-k]
