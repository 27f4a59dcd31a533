"""How wide a layer of each architecture is when all have as many parameters."""

from __future__ import annotations


def matched_d_sae(
    d_in: int, d_out: int, d_hidden: int, gated: bool, expansion: int, architecture: str = "mxd"
) -> int:
    """Experts, or units, with as many parameters as a transcoder of ``expansion * d_in`` units.

    Counted as the paper's reference counts them: the weights of both layers, and on the MxD's
    side the d_sae gate biases and d_out output biases. 21,490 for GPT2-124M at 32x. Architectures
    other than ``mxd`` and the transcoders are SAEs of the layer's output.

    Raises:
        ValueError: the transcoder is smaller than the dense part of the layer alone.
    """
    transcoder = expansion * d_in * (d_in + d_out)
    if architecture == "topk_transcoder":
        return expansion * d_in
    if architecture == "mxd":
        dense = (2 * d_in if gated else d_in) * d_hidden + d_hidden * d_out + d_out
        d_sae = round((transcoder - dense) / (d_in + d_out + 1))
    elif architecture == "topk_skip_transcoder":
        dense = d_in * d_out
        d_sae = round((transcoder - dense) / (d_in + d_out))
    else:
        dense = 0
        d_sae = round(transcoder / (2 * d_out))
    if d_sae < 1:
        raise ValueError(
            f"a {expansion}x transcoder has {transcoder:,} parameters, the dense part of a layer "
            f"of architecture {architecture} alone {dense:,}: choose a larger expansion"
        )
    return d_sae


LABELS = {
    "mxd": "MxD",
    "mxd:paper": "MxD, paper's recipe",
    "topk_transcoder": "transcoder",
    "topk_skip_transcoder": "skip transcoder",
    "topk": "SAE of the MLP's output",
}


def label(name: str) -> str:
    """What a layer is called for people."""
    return LABELS.get(name, name)
