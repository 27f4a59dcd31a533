"""How many experts have as many parameters as a transcoder."""

from __future__ import annotations


def matched_d_sae(d_in: int, d_out: int, d_hidden: int, gated: bool, expansion: int) -> int:
    """Experts of the MxD with as many parameters as a transcoder of ``expansion * d_in`` units.

    Counted as the paper's reference counts them: the weights of both layers, and on the MxD's
    side the d_sae gate biases and d_out output biases. 21,490 for GPT2-124M at 32x.

    Raises:
        ValueError: the transcoder is smaller than the dense part of the MxD alone.
    """
    transcoder = expansion * d_in * (d_in + d_out)
    dense = (2 * d_in if gated else d_in) * d_hidden + d_hidden * d_out + d_out
    d_sae = round((transcoder - dense) / (d_in + d_out + 1))
    if d_sae < 1:
        raise ValueError(
            f"a {expansion}x transcoder has {transcoder:,} parameters, the hidden layer of an "
            f"MxD alone {dense:,}: choose a larger expansion or fewer hidden units"
        )
    return d_sae
