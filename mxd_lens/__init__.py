"""Mixtures of Decoders for TransformerLens and SAELens.

Importing this package registers its architectures with SAELens, so that ``SAE.load_from_disk``
and its trainer know them.
"""

from importlib.metadata import version

from mxd_lens import startup

startup.prepare()

from mxd_lens.analysis.experts.report import inspect_experts
from mxd_lens.analysis.faithfulness import evaluate
from mxd_lens.analysis.joint import evaluate_jointly
from mxd_lens.analysis.saelens_evals import at_output, run_evals
from mxd_lens.analysis.steering import steer, steering_directions
from mxd_lens.data.text import load_text, split_documents
from mxd_lens.hub import load
from mxd_lens.layers import architectures, width_for
from mxd_lens.layers.mlp import MLPShape
from mxd_lens.layers.mxd import MxD, MxDConfig, TrainingMxD, TrainingMxDConfig
from mxd_lens.layers.transcoder import (
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingTopKSkipTranscoder,
    TrainingTopKSkipTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
)
from mxd_lens.models.load import bfloat16_is_fast, load_model
from mxd_lens.models.site import Site
from mxd_lens.models.splice import splice
from mxd_lens.report.page import write_report
from mxd_lens.report.tokens import show
from mxd_lens.runs.compare import CompareConfig, compare
from mxd_lens.runs.config import ManyConfig, TrainConfig
from mxd_lens.runs.replacement import replace
from mxd_lens.runs.train import train, train_many

__version__ = version("mxd-lens")

__all__ = [
    "CompareConfig",
    "MLPShape",
    "ManyConfig",
    "MxD",
    "MxDConfig",
    "Site",
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
    "__version__",
    "architectures",
    "at_output",
    "bfloat16_is_fast",
    "compare",
    "evaluate",
    "evaluate_jointly",
    "inspect_experts",
    "load",
    "load_model",
    "load_text",
    "replace",
    "run_evals",
    "show",
    "splice",
    "split_documents",
    "steer",
    "steering_directions",
    "train",
    "train_many",
    "width_for",
    "write_report",
]
