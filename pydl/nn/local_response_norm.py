"""LocalResponseNorm on pydl's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops.local_response_norm import local_response_norm

__all__ = ["LocalResponseNorm"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("local_response_norm")


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """torch.nn.LocalResponseNorm whose forward is :func:`pydl.ops.local_response_norm`; same arguments.

    Shape: input and output [N, C, *].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Divide each value by a power of the mean square of its neighbours in other channels."""
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)
