"""What every layer answers for itself, so that an architecture is one file.

Training, analyses, tables and pages ask these questions and no others; nothing in the package
asks a layer for its class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd_lens.layers.codes import Codes
from mxd_lens.layers.mlp import MLPShape, MLPWeights


class Layer:
    """Answers of a layer with W_enc [d_in, d_sae] and W_dec [d_sae, d_out], each unit of which
    writes its row of W_dec: other layers override.

    Of the class, and true of the inference and the training class alike where both are asked:
    """

    label: ClassVar[str]
    """What tables and plots call it."""
    default_lr: ClassVar[float]
    """Peak learning rate where the run names none."""
    has_experts: ClassVar[bool] = True
    """False for a dense control: no unit is sparsely active, so there is nothing to ablate, probe,
    inspect or steer."""
    reads_input: ClassVar[bool] = True
    """True if it maps the MLP's input to its output, and trains on batches of both; False for an
    SAE of the output."""
    splits_batches: ClassVar[bool] = False
    """True if its losses are means over tokens, none of which depends on the others: several
    processes may then train on a part of each batch and add up their gradients."""
    multiple_of: ClassVar[int] = 64
    """What widths for a budget are multiples of: a GPU reads rows of such lengths fastest."""
    sparse_hook: ClassVar[str] = "hook_sae_recons"
    """Hook point of the sparse term, [.., d_out]."""

    @property
    def sae(self) -> Any:
        """The SAELens module."""
        return self

    @property
    def dense_width(self) -> int:
        """Numbers for each token that a training step computes and keeps, beside pre-activations,
        of a layer that does not only touch what is active."""
        return 0

    @property
    def sample_size(self) -> int:
        """Tokens of the sample x on which `steering_directions` and `effect_norms` are taken."""
        return 16_384

    @classmethod
    def training_class(cls) -> Any:
        """What is trained: called with the training configuration."""
        return cls

    @classmethod
    def width_for(cls, n_parameters: int, mlp: MLPShape) -> int:
        """The d_sae with which the layer has about so many parameters; below 1 if none has."""
        return round(n_parameters / (mlp.d_in + mlp.d_out))

    def init_from(
        self, mlp: MLPWeights, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]
    ) -> None:
        """Start training from the original MLP and a sample of its inputs and outputs: here, with
        the mean output as b_dec."""
        self.sae.b_dec.data.copy_(y.mean(0))

    def run_with_codes(
        self, x: Float[Tensor, "tokens d_in"]
    ) -> tuple[Float[Tensor, "tokens d_out"], Codes, Float[Tensor, "tokens d_out"]]:
        """Output, codes and sparse term of one forward pass."""
        y, cache = self.sae.run_with_cache(x, names_filter=["hook_codes", self.sparse_hook])
        return y, cache["hook_codes"], cache[self.sparse_hook]

    def codes(self, x: Float[Tensor, "tokens d_in"]) -> Codes:
        """Which units are active on these inputs, and how much."""
        raise NotImplementedError

    def read_rows(
        self, units: Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n"]]:
        """g_n and b_n of each unit's pre-activation, ``x . g_n + b_n``."""
        return self.sae.W_enc[:, units].T, self.sae.b_enc[units]

    def write_rows(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """What 1 of each unit's activation writes, each on an input of its own."""
        return self.sae.W_dec[units]

    def at_codes(
        self, x: Float[Tensor, "*batch tokens d_in"], codes: Codes
    ) -> Float[Tensor, "*#batch tokens d_out"]:
        """The output with the codes of these tokens held, as a function of the input alone."""
        return codes.decode(self.sae.W_dec) + self.sae.b_dec

    @torch.no_grad()
    def steering_directions(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """What each unit writes per unit of activation; on a sample x, where it depends on that."""
        return self.sae.W_dec[units].clone()

    @torch.no_grad()
    def effect_norms(
        self, units: Int[Tensor, "n"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "n"]:
        """Mean norm, over the tokens of x, of what 1 more of a unit's activation changes."""
        return self.steering_directions(units, x).norm(dim=-1)

    @torch.no_grad()
    def weight_rows(self, units: Int[Tensor, "n"]) -> Float[Tensor, "n d"]:
        """A vector for each unit whose cosines are those of the units' linear maps."""
        return self.sae.W_dec[units].float()

    @torch.no_grad()
    def ranks(self) -> tuple[Int[np.ndarray, "d_sae"], Float[np.ndarray, "d_sae"]]:
        """Rank and effective rank, ``(sum s^2)^2 / sum s^4`` of its singular values s, of every
        unit's linear map; here ``W_enc[:, n] W_dec[n]``, which has rank one."""
        norm = self.sae.W_enc.norm(dim=0) * self.sae.W_dec.norm(dim=1)
        zero = (norm == 0).cpu().numpy()
        return np.where(zero, 0, 1), np.where(zero, 0.0, 1.0)
