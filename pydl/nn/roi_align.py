"""RoIAlign module on pydl's op; torch has no such class, the signature is torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops._roi import Boxes, OutputSize
from pydl.ops.roi_align import roi_align

__all__ = ["RoIAlign"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("roi_align")


class RoIAlign(torch.nn.Module):
    """Pools boxes of a feature map by :func:`pydl.ops.roi_align`; same arguments.

    Shape: input [N, C, H, W], rois [K, 5] or a list of [L, 4]; output [K, C, *output_size].
    """

    def __init__(
        self, output_size: OutputSize, spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Mean of bilinear samples in each bin of each box."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned})"
        )
