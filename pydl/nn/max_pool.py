"""Max pooling modules on pydl's ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl.ops.max_pool import (
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)

__all__ = ["AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d"]

# torch.fx traces into modules outside torch.nn: the ops must be leaves there, as torch's are
for _dims in (1, 2, 3):
    torch.fx.wrap(f"max_pool{_dims}d")
    torch.fx.wrap(f"adaptive_max_pool{_dims}d")


class MaxPool1d(torch.nn.MaxPool1d):
    """torch.nn.MaxPool1d whose forward is :func:`pydl.ops.max_pool1d`; same arguments.

    Shape: input [N, C, L] or [C, L]; output [N, C, L_out] or [C, L_out].
    """

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window (and its index with return_indices)."""
        return max_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """torch.nn.MaxPool2d whose forward is :func:`pydl.ops.max_pool2d`; same arguments.

    Shape: input [N, C, H, W] or [C, H, W]; output [N, C, H_out, W_out] or [C, H_out, W_out].
    """

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window (and its index with return_indices)."""
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool3d(torch.nn.MaxPool3d):
    """torch.nn.MaxPool3d whose forward is :func:`pydl.ops.max_pool3d`; same arguments.

    Shape: input [N, C, D, H, W] or [C, D, H, W]; output [N, C, D_out, H_out, W_out] or [C, D_out, H_out, W_out].
    """

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window (and its index with return_indices)."""
        return max_pool3d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """torch.nn.AdaptiveMaxPool1d whose forward is :func:`pydl.ops.adaptive_max_pool1d`; same arguments.

    Shape: input [N, C, L] or [C, L]; output [N, C, output_size] or [C, output_size].
    """

    def forward(self, input: Tensor) -> Any:
        """Largest value of each part (and its index with return_indices)."""
        return adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """torch.nn.AdaptiveMaxPool2d whose forward is :func:`pydl.ops.adaptive_max_pool2d`; same arguments.

    Shape: input [N, C, H, W] or [C, H, W]; output [N, C, *output_size] or [C, *output_size].
    """

    def forward(self, input: Tensor) -> Any:
        """Largest value of each part (and its index with return_indices)."""
        size: Any = self.output_size
        return adaptive_max_pool2d(input, size, self.return_indices)


class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    """torch.nn.AdaptiveMaxPool3d whose forward is :func:`pydl.ops.adaptive_max_pool3d`; same arguments.

    Shape: input [N, C, D, H, W] or [C, D, H, W]; output [N, C, *output_size] or [C, *output_size].
    """

    def forward(self, input: Tensor) -> Any:
        """Largest value of each part (and its index with return_indices)."""
        size: Any = self.output_size
        return adaptive_max_pool3d(input, size, self.return_indices)
