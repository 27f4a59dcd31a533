"""One MLP of one language model: its hooks, its weights, and the tokens that count there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import SAE
from sae_lens.training.activations_store import _get_input_token_device
from sae_lens.util import (
    extract_layer_from_tlens_hook_name,
    extract_stop_at_layer_from_tlens_hook_name,
    get_special_token_ids,
)
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mxd_lens.layers.mlp import MLPWeights, read_mlp
from mxd_lens.models.splice import check_norms, get_mlp

Hooks = tuple[str, str]


@dataclass(frozen=True)
class Site:
    """Where a layer stands in for an MLP: looked up once, by `at` or `of`, and passed on."""

    model: Any
    layer: int
    hook_in: str
    """What the layer reads."""
    hook_out: str
    """Where its output belongs."""
    special: Int[Tensor, "n_special"]
    """Ids of the tokens that are left out everywhere."""

    @classmethod
    def at(cls, model: Any, layer: int) -> Site:
        """The MLP of a layer; ValueError if there is none, or the model does not hook it."""
        restore_hook_names(model)
        return cls(model, layer, *_mlp_hooks(model, layer), special_tokens(model))

    @classmethod
    def of(cls, model: Any, sae: SAE[Any]) -> Site:
        """Where a trained layer belongs, hook names of both restored; ValueError if its metadata
        does not say, or see `check_norms`."""
        check_norms(model, sae.cfg.metadata, "this layer")
        sae.setup()  # a model that it was attached to has left its own names on the hook points
        restore_hook_names(model)
        hooks = hooks_of(sae)
        layer = extract_layer_from_tlens_hook_name(hooks[0]) or 0
        return cls(model, layer, *hooks, special_tokens(model))

    @property
    def hooks(self) -> Hooks:
        return self.hook_in, self.hook_out

    @cached_property
    def mlp_in(self) -> str:
        """Hook of the MLP's input, which an SAE of its output does not read; raises as `at`."""
        return _mlp_hooks(self.model, self.layer)[0]

    @cached_property
    def mlp(self) -> MLPWeights:
        """The MLP's weights, see `read_mlp`."""
        return read_mlp(get_mlp(self.model, self.layer))

    def on_model(self, tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Token ids on the device that the model reads them on."""
        device = _get_input_token_device(self.model)
        return tokens.to(device, non_blocking=tokens.is_cpu)

    def non_special(self, tokens: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
        """True at non-special tokens."""
        return ~torch.isin(tokens, self.special.to(tokens.device))

    def kept(
        self, acts: Mapping[str, Float[Tensor, "batch pos d"]], tokens: Int[Tensor, "batch pos"]
    ) -> dict[str, Float[Tensor, "tokens d"]]:
        """Activations by hook name at the non-special tokens, one text after the other."""
        kept = self.non_special(tokens)
        return {hook: of_hook[kept.to(of_hook.device)] for hook, of_hook in acts.items()}

    def read(
        self, tokens: Int[Tensor, "batch pos"], hooks: Hooks | tuple[str], *, autocast: bool = False
    ) -> dict[str, Float[Tensor, "tokens d"]]:
        """One pass of the model, no further than the last of these hooks, see `kept`; ValueError
        if the model lacks one."""
        stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hooks]
        tokens = self.on_model(tokens)
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
            _, cache = self.model.run_with_cache(
                tokens,
                names_filter=list(hooks),
                stop_at_layer=None if None in stops else max(filter(None, stops)),
                prepend_bos=False,
            )
        if missing := [hook for hook in hooks if hook not in cache]:
            raise ValueError(f"the model has no hook {missing[0]!r}")
        return self.kept({hook: cache[hook] for hook in hooks}, tokens)


def _mlp_hooks(model: Any, layer: int) -> Hooks:
    """The hook names of an MLP's true input and output."""
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


def special_tokens(model: Any) -> Int[Tensor, "n_special"]:
    """Ids of BOS, EOS, padding and their like: the tokens left out everywhere."""
    return torch.tensor(sorted(get_special_token_ids(model.tokenizer)), dtype=torch.long)


def hooks_of(sae: SAE[Any]) -> Hooks:
    """Where a layer reads and where its output belongs, the same for an SAE; ValueError if its
    metadata does not say."""
    metadata = sae.cfg.metadata
    if not metadata.hook_name:
        raise ValueError("sae.cfg.metadata must say hook_name: which activations it was trained on")
    return str(metadata.hook_name), str(metadata.hook_name_out or metadata.hook_name)
