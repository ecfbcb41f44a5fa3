"""RoIPool module on pydl's op; torch has no such class, the signature is torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops._roi import Boxes, OutputSize
from pydl.ops.roi_pool import roi_pool

__all__ = ["RoIPool"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("roi_pool")


class RoIPool(torch.nn.Module):
    """Pools boxes of a feature map by :func:`pydl.ops.roi_pool`; same arguments.

    Shape: input [N, C, H, W], rois [K, 5] or a list of [L, 4]; output [K, C, *output_size].
    """

    def __init__(self, output_size: OutputSize, spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Largest pixel in each bin of each box."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale})"
