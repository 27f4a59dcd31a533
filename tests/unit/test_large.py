"""What large models need: weights in bfloat16, a device of their own, text read ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mxd_lens import load_model, train
from mxd_lens.cli import main

from ..helpers import same


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "layer" / "sae_weights.safetensors")


def test_reading_ahead_changes_nothing(tiny_bridge, documents, make_config):
    for name, where in (("apart", {"llm_device": "cpu"}), ("together", {})):
        cfg = make_config(**where)
        train(make_config(output=f"{cfg.output}-{name}", **where), tiny_bridge, documents)
    same(weights(f"{cfg.output}-apart"), weights(f"{cfg.output}-together"))


def test_where_the_model_is_decides_nothing(tiny_bridge, documents, make_config):
    train(make_config(), tiny_bridge, documents)
    train(make_config(llm_device="auto"), tiny_bridge, documents)


def test_weights_in_bfloat16(llama_folder):
    model = load_model(str(llama_folder), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_map_of_devices(llama_folder):
    model = load_model(str(llama_folder), device="auto")
    assert model(torch.tensor([[1, 5, 6]])).shape == (1, 3, 24)
    with pytest.raises(ValueError, match="device auto: only a TransformerBridge"):
        load_model(str(llama_folder), "HookedTransformer", "auto")


@pytest.mark.usefixtures("offline")
def test_every_stage_with_a_model_in_bfloat16(llama_folder, text, labelled, tmp_path):
    run = tmp_path / "run"
    common = f"--model {llama_folder} --dataset {text} --layers 1 --k 3 --d_sae 12 --output {run}"
    sizes = "--training_tokens 1280 --batch_size 32 --context_size 8 --lm_batch_size 4"
    main(f"train {common} {sizes} --heldout_documents 40 --dtype bfloat16 --n_sequences 4".split())
    main(f"probe {run} --data {labelled} --n_texts 40 --n_splits 1".split())
    main(f"experts {run} --n_tokens 500 --sample_tokens 3".split())
    main(f"steer {run} --n_experts 2 --n_samples 2 --sample_tokens 3 --strengths 1".split())
    main(["report", str(run)])
    main(f"evaluate {run} --dataset {text} --n_sequences 4".split())
    row = json.loads((run / "results.json").read_text())
    assert 0 < row["ce_original"] < 10 and row["training_tokens"] == 1280
    assert row["ce_tokens"] <= 16 * 7  # one pass: the 4 sequences that were asked for
