"""Checkpoints of the MxD paper's code: MxDs, transcoders and skip transcoders.

A dictionary of ``cfg`` and ``state_dict``, pickled by ``torch.save``, as
`SparseAutoencoder.save_model` in `transcoders/sae_training/sparse_autoencoder.py` of
github.com/james-oldfield/MxD writes it. With ``cfg.use_conditional``, an MxD::

    z = act(x W_enc + b_enc)                          W_enc [d_in, d_hidden]
    z = z * (x W_glu.weight^T + W_glu.bias)           with cfg.use_glu; [d_hidden, d_in]
    a = topk(relu(x gate^T + gate_bias))              gate [n_experts, d_in]
    y = (z W_dec) * (a W_cond^T) + b_dec_out          W_dec [d_hidden, d_out]
                                                      W_cond [d_out, n_experts]

and else, with ReLU, a transcoder, with ``cfg.use_skip`` one with W_skip.weight [d_out, d_in]::

    y = topk(relu(x W_enc + b_enc)) W_dec + b_dec_out + x W_skip.weight^T

``cfg.topk`` below 1 means that all are kept. Their inputs are ``ln2.hook_normalized`` of a
HookedTransformer that `from_pretrained` has processed: that model's MLP reads just these.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from mxd_lens.formats.foreign import build, check_names, of_mlp

_GLU = ("W_glu.weight", "W_glu.bias")


class _Settings:
    """Stands in for the checkpoint's own class of settings, which is never imported: it holds
    values and does nothing."""


_SETTINGS = "sae_training.config.LanguageModelSAERunnerConfig"


def read_reference(path: str | Path, model_name: str | None = None) -> dict[int, SAE[Any]]:
    """The layer in a checkpoint of the paper's code, by its MLP.

    Args:
        path: a ``.pt`` file. Only tensors and plain values are unpickled (``weights_only``).
        model_name: by default what the checkpoint says.

    Returns:
        ``mxd``, ``topk_transcoder``, ``topk_skip_transcoder``, ``transcoder`` or
        ``skip_transcoder``, for ``HookedSAETransformer.from_pretrained(name)``, whose weights are
        processed: `mxd_lens.splice` refuses others.

    Raises:
        ValueError: a file that is missing, damaged, of another format, or that holds anything but
            tensors and values; an SAE, or an architecture that is not above.
    """
    path = Path(path)
    cfg, weights = _unpickle(path)
    number = _mlp(path, cfg)
    metadata = of_mlp(
        number, model_name or cfg.get("model_name"), "HookedTransformer", norms_folded=True
    )
    conditional, skip, glu = (
        bool(cfg.get(f"use_{name}")) for name in ("conditional", "skip", "glu")
    )
    if (conditional and skip) or (glu and not conditional):
        raise ValueError(
            f"{path} is an MxD with a skip, or a transcoder with a GLU, which no layer here is"
        )
    if conditional:
        return {number: _mxd(path, cfg, weights, metadata, glu)}
    return {number: _transcoder(path, cfg, weights, metadata, skip)}


def _unpickle(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of a checkpoint."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    safe: list[Any] = [(_Settings, _SETTINGS)]
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile have kinds of their own
        why = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not read: it is damaged, or holds more than tensors and settings, which "
            "could run code. If you trust it, load it with its own code and write its 'cfg' and "
            f"'state_dict' with torch.save ({type(error).__name__}: {why[:200]})"
        ) from error
    cfg = found.get("cfg") if isinstance(found, dict) else None
    weights = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(cfg, _Settings) or not isinstance(weights, dict):
        raise ValueError(
            f"{path} is no checkpoint of the MxD paper's code: it has no 'cfg' of its class and "
            "'state_dict'"
        )
    return vars(cfg), weights


def _mlp(path: Path, cfg: dict[str, Any]) -> int:
    reads, writes = (str(cfg.get(name)) for name in ("hook_point", "out_hook_point"))
    found = re.fullmatch(r"blocks\.(\d+)\.(?:ln2\.hook_normalized|mlp\.hook_in)", reads)
    if not cfg.get("is_transcoder") or not found or writes != f"blocks.{found[1]}.hook_mlp_out":
        raise ValueError(
            f"{path} reads {reads} and writes {writes}: it does not stand for an MLP, whose input "
            "is blocks.N.ln2.hook_normalized and whose output blocks.N.hook_mlp_out"
        )
    return int(found[1])


def _mxd(
    path: Path, cfg: dict[str, Any], found: dict[str, Tensor], metadata: Any, glu: bool
) -> SAE[Any]:
    required = ("W_enc", "b_enc", "W_dec", "gate", "gate_bias", "W_cond", "b_dec_out")
    check_names(path, found, (*required, *(_GLU if glu else ())), ("b_dec",))
    weights = {
        "W_enc": found["gate"].mT,
        "b_enc": found["gate_bias"],
        "W_dec": found["W_cond"].mT,
        "W_shared": found["W_dec"],
        "b_dec": found["b_dec_out"],
        "W_hidden_gate" if glu else "W_hidden": found["W_enc"],
        "b_hidden_gate" if glu else "b_hidden": found["b_enc"],
    }
    if glu:
        weights |= {"W_hidden": found["W_glu.weight"].mT, "b_hidden": found["W_glu.bias"]}
    d_hidden, n_experts = len(found["b_enc"]), len(found["gate_bias"])
    k = _topk(path, cfg) or n_experts
    act_fn = str(cfg.get("mlp_activation_fn"))
    shape = {"d_hidden": d_hidden, "k": k, "act_fn": act_fn, "gated": glu}
    return build(path, "mxd", weights, metadata, **shape)


def _transcoder(
    path: Path, cfg: dict[str, Any], found: dict[str, Tensor], metadata: Any, skip: bool
) -> SAE[Any]:
    act_fn = cfg.get("mlp_activation_fn")
    if act_fn != "relu":
        raise ValueError(f"{path} is a transcoder with {act_fn}: here it has ReLU")
    required = ("W_enc", "b_enc", "W_dec", "b_dec_out")
    check_names(path, found, (*required, *(("W_skip.weight",) if skip else ())), ("b_dec",))
    weights = {name: found[name] for name in required[:3]} | {"b_dec": found["b_dec_out"]}
    if skip:
        weights["W_skip"] = found["W_skip.weight"]
    k = _topk(path, cfg)
    name = "skip_transcoder" if skip else "transcoder"
    if k is None:
        return build(path, name, weights, metadata)
    return build(path, f"topk_{name}", weights, metadata, k=k)


def _topk(path: Path, cfg: dict[str, Any]) -> int | None:
    """How many are kept; None if all are."""
    k = cfg.get("topk")
    if not isinstance(k, int) or k == 0:
        raise ValueError(f"{path} has topk={k!r} in its settings, which is no number of units")
    return k if k > 0 else None
