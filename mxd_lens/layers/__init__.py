"""The architectures: each is one file here, which registers its classes with SAELens.

To add one, write a file with a subclass of `SparseLayer` or `PairLayer`, its configurations and
its training class, and register them: every file in this folder is imported. Nothing else has to
know of it.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from mxd_lens.layers.layer import Layer
from mxd_lens.layers.mlp import MLPShape
from mxd_lens.layers.sae import KNOWN

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def architectures() -> list[str]:
    """Names of all architectures that can be trained."""
    registered = SAE_TRAINING_CLASS_REGISTRY
    ours = [name for name, (cls, _) in registered.items() if issubclass(cls, Layer)]
    return [*ours, *(name for name in KNOWN if name in registered)]


def answers(architecture: str) -> type[Layer]:
    """The class that answers for an architecture that can be trained; ValueError for another."""
    if architecture in architectures():
        training_class: Any = SAE_TRAINING_CLASS_REGISTRY[architecture][0]
        return training_class if issubclass(training_class, Layer) else KNOWN[architecture]
    raise ValueError(
        f"unknown architecture {architecture!r}; known: {', '.join(sorted(architectures()))}"
    )


def label(architecture: str) -> str:
    """What tables and plots call an architecture; raises as `answers` does."""
    return answers(architecture).label


def config_class(architecture: str) -> type[Any]:
    """SAELens' training configuration of an architecture; raises as `answers` does."""
    answers(architecture)
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def layer_of(sae: Any) -> Layer:
    """What answers for a layer: itself, or an adapter for one of SAELens' own; ValueError if the
    architecture is neither's."""
    if isinstance(sae, Layer):
        return sae
    architecture = sae.cfg.architecture()
    if architecture not in KNOWN:
        raise ValueError(
            f"unknown architecture {architecture!r} of {type(sae).__name__}: derive it from "
            "mxd_lens.layers.layer.Layer, or train one of "
            f"{', '.join(sorted(architectures()))}"
        )
    return KNOWN[architecture](sae)


def width_for(architecture: str, mlp: MLPShape, expansion: int, *, exact: bool = False) -> int:
    """The d_sae with as many parameters as a transcoder of ``expansion * d_in`` units, to the
    nearest multiple of `Layer.multiple_of`; ValueError if that is smaller than the layer without
    any units.

    Args:
        exact: the number itself, counted as the paper's reference counts it: 21,490 experts for
            GPT2-124M at 32x.
    """
    transcoder = expansion * mlp.d_in * (mlp.d_in + mlp.d_out)
    layer = answers(architecture)
    width = layer.width_for(transcoder, mlp)
    if width < 1:
        raise ValueError(
            f"a {expansion}x transcoder has {transcoder:,} parameters, fewer than a layer of "
            f"architecture {architecture} has without units: choose a larger expansion"
        )
    unit = 1 if exact or width < layer.multiple_of else layer.multiple_of
    return unit * round(width / unit)
