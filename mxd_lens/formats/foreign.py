"""What reading any foreign format takes: checked tensors, and the layer that they make."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.util import dtype_to_str
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mxd_lens.models.load import ModelClass


def read_tensors(
    path: Path, required: Collection[str], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, see `check_names`; ValueError if it is none."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): fetch it again") from None
    check_names(path, tensors, required, optional)
    return tensors


def check_names(
    path: Path, tensors: Mapping[str, Any], required: Collection[str], optional: Collection[str]
) -> None:
    """Raise ValueError, which names the file, unless it holds all the required tensors, and beside
    them none but optional ones."""
    if missing := [name for name in required if name not in tensors]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(tensors) or 'none'}"
        )
    if unknown := [name for name in tensors if name not in {*required, *optional}]:
        raise ValueError(f"{path} has {', '.join(unknown)}, which this format does not know")
    if strange := [name for name, tensor in tensors.items() if not _is_weight(tensor)]:
        raise ValueError(f"{path}: {', '.join(strange)} does not hold floating-point numbers")


def _is_weight(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def of_mlp(
    layer: int, model_name: str | None, model_class: ModelClass, *, norms_folded: bool = False
) -> SAEMetadata:
    """Metadata of what stands for an MLP, see `mxd_lens.models.site.Site.at`."""
    bridged = model_class == "TransformerBridge"
    return SAEMetadata(
        model_name=model_name,
        hook_name=f"blocks.{layer}.mlp.hook_in",
        hook_name_out=f"blocks.{layer}.{'mlp.hook_out' if bridged else 'hook_mlp_out'}",
        norms_folded=norms_folded,
    )


def build(
    path: Path, architecture: str, weights: dict[str, Tensor], metadata: SAEMetadata, **options: Any
) -> SAE[Any]:
    """A layer with these weights, in their dtype, on the CPU.

    Args:
        path: whose weights they are.
        weights: by the layer's own names; W_enc [d_in, d_sae] and W_dec [d_sae, d_out] at least.
        options: further fields of its configuration.

    Raises:
        ValueError: the weights' shapes do not fit together, or k does not fit them.
    """
    layer_class, config_class = get_sae_class(architecture)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    W_enc, W_dec = shapes["W_enc"], shapes["W_dec"]
    if len(W_enc) != 2 or len(W_dec) != 2:
        raise ValueError(f"{path}: encoder and decoder are no matrices, but {W_enc} and {W_dec}")
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
    try:
        config: Any = config_class(
            **{"d_in": W_enc[0], "d_sae": W_enc[1], "d_out": W_dec[1]},
            dtype=dtype_to_str(dtype),
            device="cpu",
            apply_b_dec_to_input=False,
            metadata=metadata,
            **options,
        )
        layer: Any = layer_class(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = {name: tuple(weight.shape) for name, weight in layer.state_dict().items()}
    if expected != shapes:
        wrong = sorted(name for name, _ in expected.items() ^ shapes.items())
        raise ValueError(
            f"{path}: shapes do not fit together, of {', '.join(dict.fromkeys(wrong))}; with "
            f"d_in={W_enc[0]}, d_sae={W_enc[1]}, d_out={W_dec[1]} they would be "
            f"{ {name: expected.get(name) for name in dict.fromkeys(wrong)} }"
        )
    layer.process_state_dict_for_loading(weights)
    layer.load_state_dict(weights)
    return layer
