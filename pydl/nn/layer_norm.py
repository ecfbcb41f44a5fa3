"""LayerNorm on pydl's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops.layer_norm import layer_norm

__all__ = ["LayerNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm whose forward is :func:`pydl.ops.layer_norm`; same arguments, parameters and state_dict.

    Shape: input and output [*, *normalized_shape].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each sample over its last dimensions."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
