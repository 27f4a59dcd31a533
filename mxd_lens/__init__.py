"""Mixtures of Decoders for TransformerLens and SAELens.

Importing this package registers the architecture ``mxd`` with SAELens, so that
``SAE.load_from_disk`` and SAELens' trainer know it.
"""

from mxd_lens.mxd import MxD, MxDConfig, TrainingMxD, TrainingMxDConfig
from mxd_lens.splice import splice

__all__ = ["MxD", "MxDConfig", "TrainingMxD", "TrainingMxDConfig", "splice"]
