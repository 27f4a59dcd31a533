"""Where the time of a real `mxd-lens train` goes: SmolLM2-135M, layer 6, Wikipedia.

    make bench-train [DEVICE=cuda]

One run as long as a comparison's, 600 steps of 2,048 tokens in bfloat16, every part timed as it is
called, without the parts it calls.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from mxd_lens import TrainConfig, load_model, train
from mxd_lens.data.stream import Stream
from mxd_lens.layers.base import TrainingPairLayer

DEVICE = os.environ.get("DEVICE", "cpu")
REST = "the rest of the trainer"
PARTS: dict[str, tuple[Any, str]] = {
    "language model": (ActivationsStore, "get_multi_hook_activations"),
    "buffer, tokens": (Stream, "__next__"),
    "layer, forward": (TrainingPairLayer, "training_forward_pass"),
    "layer, backward": (torch.Tensor, "backward"),
    "clipping": (torch.nn.utils, "clip_grad_norm_"),
    "optimiser": (torch.optim.Adam, "step"),
    "checkpoints": (SAETrainer, "save_checkpoint"),
    REST: (MultiSAETrainer, "fit"),
}


def main() -> None:
    seconds: defaultdict[str, float] = defaultdict(float)
    within = [0.0]  # seconds of the parts that each of those under way has called

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == REST:
                seconds.clear()  # what came before was set-up
            within.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            seconds[name] += took - within.pop()
            within[-1] += took
            return result

        return call

    model = load_model("demo:smollm2", device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            model="demo:smollm2",
            layer=6,
            dataset="demo:wikipedia",
            output=folder,
            training_tokens=600 * 2048,
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
    total = sum(seconds.values())
    print(f"\ntorch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("| part | seconds | share |\n|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.1f} | {spent / total:.1%} |")


if __name__ == "__main__":
    main()
