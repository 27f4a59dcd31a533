"""The TopK transcoders against SAELens' own."""

import pytest
import torch
from sae_lens.saes.transcoder import (
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)

from tests.helpers import close, make_layer

SAELENS = {
    "topk_transcoder": (Transcoder, TranscoderConfig),
    "topk_skip_transcoder": (SkipTranscoder, SkipTranscoderConfig),
}


@pytest.mark.parametrize("kind", SAELENS)
def test_with_all_units_allowed_it_is_saelens_transcoder(kind):
    layer, x = make_layer(kind, k=11), torch.randn(6, 5, dtype=torch.float64)
    cls, cfg = SAELENS[kind]
    other = cls(cfg(d_in=5, d_out=4, d_sae=11, dtype="float64", apply_b_dec_to_input=False))
    other.load_state_dict(layer.state_dict())
    close(layer(x), other(x))
    close(layer.encode(x), other.encode(x))
    close(layer.forward_with_activations(x), other.forward_with_activations(x))
