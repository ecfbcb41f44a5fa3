"""Average pooling modules on pydl's ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl.ops.avg_pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
)

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
]

# torch.fx traces into modules outside torch.nn: the ops must be leaves there, as torch's are
for _dims in (1, 2, 3):
    torch.fx.wrap(f"avg_pool{_dims}d")
    torch.fx.wrap(f"adaptive_avg_pool{_dims}d")
    torch.fx.wrap(f"lp_pool{_dims}d")


class AvgPool1d(torch.nn.AvgPool1d):
    """torch.nn.AvgPool1d whose forward is :func:`pydl.ops.avg_pool1d`; same arguments.

    Shape: input [N, C, L] or [C, L]; output [N, C, L_out] or [C, L_out].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AvgPool2d(torch.nn.AvgPool2d):
    """torch.nn.AvgPool2d whose forward is :func:`pydl.ops.avg_pool2d`; same arguments.

    Shape: input [N, C, H, W] or [C, H, W]; output [N, C, H_out, W_out] or [C, H_out, W_out].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(torch.nn.AvgPool3d):
    """torch.nn.AvgPool3d whose forward is :func:`pydl.ops.avg_pool3d`; same arguments.

    Shape: input [N, C, D, H, W] or [C, D, H, W]; output [N, C, D_out, H_out, W_out] or [C, D_out, H_out, W_out].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """torch.nn.AdaptiveAvgPool1d whose forward is :func:`pydl.ops.adaptive_avg_pool1d`; same arguments.

    Shape: input [N, C, L] or [C, L]; output [N, C, output_size] or [C, output_size].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each part."""
        return adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d whose forward is :func:`pydl.ops.adaptive_avg_pool2d`; same arguments.

    Shape: input [N, C, H, W] or [C, H, W]; output [N, C, *output_size] or [C, *output_size].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each part."""
        size: Any = self.output_size
        return adaptive_avg_pool2d(input, size)


class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    """torch.nn.AdaptiveAvgPool3d whose forward is :func:`pydl.ops.adaptive_avg_pool3d`; same arguments.

    Shape: input [N, C, D, H, W] or [C, D, H, W]; output [N, C, *output_size] or [C, *output_size].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each part."""
        size: Any = self.output_size
        return adaptive_avg_pool3d(input, size)


class LPPool1d(torch.nn.LPPool1d):
    """torch.nn.LPPool1d whose forward is :func:`pydl.ops.lp_pool1d`; same arguments.

    Shape: input [N, C, L] or [C, L]; output of the same rank.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The p-th root of the sum of p-th powers of each window."""
        kernel: Any = self.kernel_size
        return lp_pool1d(input, float(self.norm_type), kernel, self.stride, self.ceil_mode)


class LPPool2d(torch.nn.LPPool2d):
    """torch.nn.LPPool2d whose forward is :func:`pydl.ops.lp_pool2d`; same arguments.

    Shape: input [N, C, H, W] or [C, H, W]; output of the same rank.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The p-th root of the sum of p-th powers of each window."""
        kernel: Any = self.kernel_size
        return lp_pool2d(input, float(self.norm_type), kernel, self.stride, self.ceil_mode)


class LPPool3d(torch.nn.LPPool3d):
    """torch.nn.LPPool3d whose forward is :func:`pydl.ops.lp_pool3d`; same arguments.

    Shape: input [N, C, D, H, W] or [C, D, H, W]; output of the same rank.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The p-th root of the sum of p-th powers of each window."""
        kernel: Any = self.kernel_size
        return lp_pool3d(input, float(self.norm_type), kernel, self.stride, self.ceil_mode)
