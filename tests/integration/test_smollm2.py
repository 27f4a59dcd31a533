"""The whole journey on the real SmolLM2-135M and real text, shortened."""

import json

import pytest
import torch
from sae_lens import SAE

from mxd_lens import MxD, bfloat16_is_fast, load_model, splice
from mxd_lens.cli import main

PROMPT = "The Battle of Hastings was fought in the year"


@pytest.fixture(scope="module", params=["TransformerBridge", "HookedTransformer"])
def model(request):
    return load_model("demo:smollm2", request.param)


def test_the_mlp_as_an_mxd_is_the_model_unchanged(model):
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad():
        original = model(tokens)
        with splice(
            model,
            {
                6: MxD.from_mlp(model.blocks[6].mlp),
                15: MxD.from_mlp(model.blocks[15].mlp, d_sae=64, k=8),
            },
        ):
            swapped, cache = model.run_with_cache(tokens)
        restored = model(tokens)
    assert cache["blocks.15.mlp.hook_experts"].shape == (*tokens.shape, 576)
    torch.testing.assert_close(swapped, original, rtol=1e-4, atol=1e-3)
    assert torch.equal(restored, original)


def test_train_on_a_local_file_swap_in_and_measure(tmp_path, capsys):
    from mxd_lens.demo.corpora import wikipedia

    text = tmp_path / "text.jsonl"
    wikipedia().shuffle(seed=1).select(range(1500)).to_json(text)
    run = tmp_path / "run"
    arguments = (
        f"train --model demo:smollm2 --layers 6 --dataset {text} --output {run} "
        f"--autocast {bfloat16_is_fast()} "
        "--d_sae 1024 --training_tokens 81920 --heldout_documents 300"
    ).split()
    main(arguments)
    results = json.loads((run / "results.json").read_text())
    # A tenth of the demo's tokens and a seventh of its experts: most, not all, is recovered.
    assert results["ce_recovered"] > 0.5
    assert results["always_on"] == 0
    assert results["ce_original"] < results["ce_replaced"] < results["ce_zero_ablation"]
    page = (run / "results.html").read_text()
    assert "plotly" in page and "http://" not in page.split("<table>")[1]
    table = capsys.readouterr().out
    assert f"{results['ce_original']:.4f}" in table
    main(arguments)
    assert "found finished" in capsys.readouterr().out

    mxd = SAE.load_from_disk(run / "layer")
    model = load_model("demo:smollm2")
    model.blocks[6].mlp = mxd
    assert model(PROMPT).isfinite().all()


def test_errors_are_one_sentence(tmp_path):
    common = ["--dataset", "demo:wikipedia", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="mxd-lens: no layer 30: this model has layers 0 to 29"):
        main(["train", "--model", "demo:smollm2", "--layer", "30", *common])
    with pytest.raises(SystemExit, match="holds neither a finished run nor a comparison"):
        main(["evaluate", str(tmp_path)])
