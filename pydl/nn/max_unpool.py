"""Max unpooling modules on pydl's ops."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops.max_unpool import max_unpool1d, max_unpool2d, max_unpool3d

__all__ = ["MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d"]

# torch.fx traces into modules outside torch.nn: the ops must be leaves there, as torch's are
for _dims in (1, 2, 3):
    torch.fx.wrap(f"max_unpool{_dims}d")


class MaxUnpool1d(torch.nn.MaxUnpool1d):
    """torch.nn.MaxUnpool1d whose forward is :func:`pydl.ops.max_unpool1d`; same arguments.

    Shape: input and indices [N, C, L] or [C, L]; output [N, C, L_out] or [C, L_out].
    """

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Each element at its position, zero elsewhere."""
        return max_unpool1d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """torch.nn.MaxUnpool2d whose forward is :func:`pydl.ops.max_unpool2d`; same arguments.

    Shape: input and indices [N, C, H, W] or [C, H, W]; output [N, C, H_out, W_out] or [C, H_out, W_out].
    """

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Each element at its position, zero elsewhere."""
        return max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool3d(torch.nn.MaxUnpool3d):
    """torch.nn.MaxUnpool3d whose forward is :func:`pydl.ops.max_unpool3d`; same arguments.

    Shape: input and indices [N, C, D, H, W] or [C, D, H, W]; output [N, C, D_out, H_out, W_out] or without N.
    """

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Each element at its position, zero elsewhere."""
        return max_unpool3d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
