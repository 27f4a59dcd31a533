"""Everything but ``--model_class HookedTransformer`` without that class.

TransformerLens 4 has it no more. SAELens 6 imports it at its top and gets it here; afterwards it is
gone for everybody. This shows that we never ask for it, not that a SAELens on TransformerLens 4
suits us.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from importlib import import_module
from pkgutil import walk_packages

import sae_lens
import torch
import transformer_lens

for module in walk_packages(sae_lens.__path__, "sae_lens."):
    if not module.name.startswith("sae_lens.tutorial"):
        import_module(module.name)

GONE = {"transformer_lens": ["HookedTransformer"]}
GONE |= {"sae_lens": ["HookedSAETransformer"]}
GONE |= {"sae_lens.analysis": ["hooked_sae_transformer"]}


class Gone:
    def find_spec(self, name, path=None, target=None):
        package, _, last = name.rpartition(".")
        if last in GONE.get(package, []):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Gone())
for package, names in GONE.items():
    for name in names:
        delattr(sys.modules[package], name)
        sys.modules.pop(f"{package}.{name}", None)
assert not any(hasattr(package, "HookedTransformer") for package in (transformer_lens, sae_lens))

import mxd_lens.cli
import mxd_lens.runs.analyse

mxd_lens.runs.analyse.embed = lambda texts, **_: torch.eye(8)[[len(text) % 8 for text in texts]]
mxd_lens.analysis.judge.embed = mxd_lens.runs.analyse.embed

model, text, labelled, folder = sys.argv[1:]
common = f"--model {model} --dataset {text} --training_tokens 640 --batch_size 32 --device cpu"
common += " --context_size 8 --lm_batch_size 4 --heldout_documents 40 --layers 0 1"
common += f" --expansion 8 --n_sequences 4 --k 2 --output {folder}"
mxd_lens.cli.main(["compare", *common.split(), "--architectures", "mxd", "dense"])
one = f"{folder}/layer1-mxd-k2-seed0"
mxd_lens.cli.main(["evaluate", folder, "--joint", "--n_sequences", "4"])
mxd_lens.cli.main(["probe", one, "--data", labelled, "--n_texts", "40", "--n_splits", "1"])
mxd_lens.cli.main(["experts", one, "--n_tokens", "800", "--sample_strength", "0"])
few = "--n_experts 1 --strengths 1 --n_samples 2 --sample_tokens 2 --prompt the"
mxd_lens.cli.main(["steer", one, *few.split()])
mxd_lens.cli.main(["report", one])
model = mxd_lens.load_model(model)
mxd_lens.replace(model, one)
assert model(torch.randint(3, 20, (2, 8))).isfinite().all()
print("all of it works")
common = [*common.split()[:-1], folder + "2", "--model_class", "HookedTransformer"]
mxd_lens.cli.main(["train", *common])
"""


def test_all_but_its_own_option_works_without_hooked_transformer(
    llama_folder, text, labelled, tmp_path
):
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(llama_folder), text, labelled, str(tmp_path / "runs")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert "all of it works" in found.stdout, found.stderr
    assert found.returncode == 1 and (tmp_path / "runs/layer1-mxd-k2-seed0/report.html").exists()
    (said,) = [line for line in found.stderr.splitlines() if line.startswith("mxd-lens: ")]
    assert "has no HookedTransformer: leave model_class at TransformerBridge" in said
