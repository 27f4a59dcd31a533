import pytest
import torch

from mxd_lens import MxD, MxDConfig, matched_d_sae

D_MODEL, D_HIDDEN = 576, 1536


def test_the_references_own_number():
    assert matched_d_sae(768, 768, 3072, gated=False, expansion=32) == 21_490


@pytest.mark.parametrize("d_sae", [matched_d_sae(D_MODEL, D_MODEL, D_HIDDEN, True, 16), 6_911])
def test_real_parameter_counts_agree_within_a_thousandth(d_sae):
    units = 16 * D_MODEL
    transcoder = D_MODEL * units + units + units * D_MODEL + D_MODEL
    with torch.device("meta"):
        cfg = MxDConfig(d_in=D_MODEL, d_out=D_MODEL, d_hidden=D_HIDDEN, d_sae=d_sae, device="meta")
    n_parameters = sum(p.numel() for p in MxD(cfg).parameters())
    assert n_parameters == pytest.approx(transcoder, rel=1e-3)


def test_a_transcoder_smaller_than_the_hidden_layer():
    with pytest.raises(ValueError, match="larger expansion"):
        matched_d_sae(768, 768, 3072, gated=False, expansion=1)
