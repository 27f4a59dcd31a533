"""The paper's four settings (arXiv 2505.21364), as `mxd-lens train --preset` takes them.

Where the paper gives a range, a value in it: Pythia-1.4B's layer, near the middle, and the Pythias'
learning rates, from 1e-4 to 4e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mxd_lens.layers.mlp import MLPShape
from mxd_lens.runs.config import TrainConfig
from mxd_lens.runs.train import shapes_of


@dataclass(frozen=True)
class Preset:
    """A layer of a model, how the paper trains there, and what shape its MLP has."""

    model: str
    layer: int
    lr: float
    shape: MLPShape

    def train_config(self, **values: Any) -> TrainConfig:
        """The run, with other values where given."""
        paper: dict[str, Any] = {
            "model": self.model,
            "layer": self.layer,
            "dataset": "Skylion007/openwebtext",
            "streaming": True,
            "output": f"runs/{self.model.rpartition('/')[2].lower()}",
            "expansion": 32,
            "training_tokens": 480_000_000,
            "batch_size": 4096,
            "context_size": 128,
            "recipe": "paper",
            "lr": self.lr,
            "lr_warm_up_steps": 5000,
            "lr_decay_steps": 0,
        }
        return TrainConfig(**(paper | values))


PRESETS = {
    "gpt2-124m": Preset("gpt2", 8, 1e-4, MLPShape(768, 768, 3072, "gelu_new", False)),
    "pythia-410m": Preset(
        "EleutherAI/pythia-410m", 15, 2e-4, MLPShape(1024, 1024, 4096, "gelu", False)
    ),
    "pythia-1.4b": Preset(
        "EleutherAI/pythia-1.4b", 12, 2e-4, MLPShape(2048, 2048, 8192, "gelu", False)
    ),
    "llama-3.2-3b": Preset(
        "meta-llama/Llama-3.2-3B", 12, 1e-4, MLPShape(3072, 3072, 8192, "silu", True)
    ),
}


def dry_run(preset: Preset, cfg: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters the run would train, without allocating any of them."""
    hooks = (f"blocks.{cfg.layer}.mlp.hook_in", f"blocks.{cfg.layer}.mlp.hook_out")
    return shapes_of(cfg, preset.shape, hooks)
