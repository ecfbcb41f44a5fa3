"""Max pooling modules on pydl's ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl.ops.max_pool import max_pool2d

__all__ = ["MaxPool2d"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("max_pool2d")


class MaxPool2d(torch.nn.MaxPool2d):
    """torch.nn.MaxPool2d whose forward is :func:`pydl.ops.max_pool2d`; same arguments.

    Shape: input [N, C, H, W] or [C, H, W]; output [N, C, H_out, W_out] or [C, H_out, W_out].
    """

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window (and its index with return_indices)."""
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )
