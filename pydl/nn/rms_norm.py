"""RMSNorm on pydl's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops.rms_norm import rms_norm

__all__ = ["RMSNorm"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("rms_norm")


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm whose forward is :func:`pydl.ops.rms_norm`; same arguments, parameters and state_dict.

    Shape: input and output [*, *normalized_shape].
    """

    def forward(self, x: Tensor) -> Tensor:
        """Divide each sample by its root mean square over the last dimensions."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
