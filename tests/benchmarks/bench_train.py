"""Where the time of a real `mxd-lens train` goes: SmolLM2-135M, layer 6, Wikipedia.

    make bench-train [DEVICE=cuda]

One run of 200 steps of 2,048 tokens in bfloat16, every part timed as it is called.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

from mxd_lens import TrainConfig, load_model, train
from mxd_lens.layer import TrainingTopKLayer

DEVICE = os.environ.get("DEVICE", "cpu")
PARTS: dict[str, tuple[Any, str]] = {
    "language model": (ActivationsStore, "get_multi_hook_activations"),
    "layer, forward": (TrainingTopKLayer, "training_forward_pass"),
    "layer, backward": (torch.Tensor, "backward"),
    "optimiser": (torch.optim.Adam, "step"),
    "all of training": (SAETrainer, "fit"),
}


def main() -> None:
    seconds: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "all of training":
                seconds.clear()  # what came before was set-up
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - start
            return result

        return call

    model = load_model("demo:smollm2", device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            model="demo:smollm2",
            layer=6,
            dataset="demo:wikipedia",
            output=folder,
            training_tokens=200 * 2048,
            autocast=True,
            device=DEVICE,
        )
        patches = [
            patch.object(owner, method, timed(name, getattr(owner, method)))
            for name, (owner, method) in PARTS.items()
        ]
        for each in patches:
            each.start()
        try:
            train(cfg, model)
        finally:
            for each in patches:
                each.stop()
    total = seconds.pop("all of training")
    seconds["everything else"] = total - sum(seconds.values())
    print(f"\ntorch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| part | seconds | share |\n|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.1f} | {spent / total:.0%} |")


if __name__ == "__main__":
    main()
