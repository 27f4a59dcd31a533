"""Mixtures of Decoders for TransformerLens and SAELens.

Importing this package registers the architectures ``mxd``, ``topk_transcoder`` and
``topk_skip_transcoder`` with SAELens, so that ``SAE.load_from_disk`` and its trainer know them.
"""

from mxd_lens import startup

startup.prepare()

from mxd_lens.compare import CompareConfig, compare
from mxd_lens.data import load_text, split_documents
from mxd_lens.experts import inspect_experts
from mxd_lens.faithfulness import evaluate
from mxd_lens.matching import matched_d_sae
from mxd_lens.models import bfloat16_is_fast, load_model
from mxd_lens.mxd import MxD, MxDConfig, TrainingMxD, TrainingMxDConfig
from mxd_lens.report import write_report
from mxd_lens.saelens_evals import at_output, run_evals
from mxd_lens.splice import splice
from mxd_lens.steering import steer
from mxd_lens.train import TrainConfig, train
from mxd_lens.transcoder import (
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingTopKSkipTranscoder,
    TrainingTopKSkipTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
)

__all__ = [
    "CompareConfig",
    "MxD",
    "MxDConfig",
    "TopKSkipTranscoder",
    "TopKSkipTranscoderConfig",
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainConfig",
    "TrainingMxD",
    "TrainingMxDConfig",
    "TrainingTopKSkipTranscoder",
    "TrainingTopKSkipTranscoderConfig",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
    "at_output",
    "bfloat16_is_fast",
    "compare",
    "evaluate",
    "inspect_experts",
    "load_model",
    "load_text",
    "matched_d_sae",
    "run_evals",
    "splice",
    "split_documents",
    "steer",
    "train",
    "write_report",
]
