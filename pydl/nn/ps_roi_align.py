"""PSRoIAlign module on pydl's op; torch has no such class, the signature is torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor

from pydl.ops._roi import Boxes, OutputSize
from pydl.ops.ps_roi_align import ps_roi_align

__all__ = ["PSRoIAlign"]

# torch.fx traces into modules outside torch.nn: the op must be a leaf there, as torch's is
torch.fx.wrap("ps_roi_align")


class PSRoIAlign(torch.nn.Module):
    """Pools boxes of a position-sensitive feature map by :func:`pydl.ops.ps_roi_align`; same arguments.

    Shape: input [N, C * height * width, H, W], rois [K, 5] or a list of [L, 4]; output [K, C, height, width].
    """

    def __init__(self, output_size: OutputSize, spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Mean of bilinear samples in each bin of each box, from the bin's own channels."""
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio})"
        )
