"""LayerNorm on pydl's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops.layer_norm import layer_norm

__all__ = ["LayerNorm"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("layer_norm")


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm whose forward is :func:`pydl.ops.layer_norm`; same arguments, parameters and state_dict.

    Shape: input and output [*, *normalized_shape].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each sample over its last dimensions."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
