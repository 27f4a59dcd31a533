"""Where in a language model an MLP is: the hooks of its input and output, the tokens left out."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mxd_lens.models.splice import get_mlp


def mlp_hooks(model: Any, layer: int) -> tuple[str, str]:
    """The hook names of an MLP's true input and output.

    Raises:
        ValueError: no such layer, no MLP there, or a model that does not hook them.
    """
    get_mlp(model, layer)
    hook_in = f"blocks.{layer}.mlp.hook_in"
    if isinstance(model, TransformerBridge):
        return hook_in, f"blocks.{layer}.mlp.hook_out"
    if getattr(model.cfg, "use_normalization_before_and_after", False):
        raise ValueError(
            "this HookedTransformer norms the MLP's output before its hook sees it; "
            "load the model as a TransformerBridge instead"
        )
    if hook_in not in model.hook_dict:
        raise ValueError(
            f"a bare {type(model).__name__} has no {hook_in}; load the model as a "
            "HookedSAETransformer or a TransformerBridge"
        )
    return hook_in, f"blocks.{layer}.hook_mlp_out"


def restore_hook_names(model: Any) -> None:
    """Give the hook points of a bridge their full names again.

    SAELens' `saes` and `run_with_saes` leave the one at which a layer was attached with a short
    name, and a bridge silently ignores edits at such a hook.
    """
    if isinstance(model, TransformerBridge):
        hooks = model.hook_dict
        for name, hook in hooks.items():
            if hook.name not in hooks:
                hook.name = name


def special_tokens(model: Any) -> Tensor:
    """Ids of BOS, EOS, padding and their like: the tokens left out everywhere."""
    return torch.tensor(sorted(get_special_token_ids(model.tokenizer)), dtype=torch.long)


Hooks = tuple[str, str]


def hooks_of(sae: SAE[Any]) -> Hooks:
    """Where a layer reads and where its output belongs: one and the same for an SAE.

    Raises:
        ValueError: its metadata does not say.
    """
    metadata = sae.cfg.metadata
    if not metadata.hook_name:
        raise ValueError("sae.cfg.metadata must say hook_name: which activations it was trained on")
    return str(metadata.hook_name), str(metadata.hook_name_out or metadata.hook_name)
