"""RoI pooling as compositions of torch's functions: for devices and modes that no kernel covers.

The signatures are the public ones; boxes are [K, 5] rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydl.ops._roi import OutputSize, channels_last, pair

# elements of the largest intermediate: boxes are taken in portions of that size
PORTION = 1 << 24


class _Reads(NamedTuple):
    """What the samples of each bin along one axis read: two pixels and their weights, each [K, bins, samples]."""

    low: Tensor
    high: Tensor
    low_weight: Tensor
    high_weight: Tensor


def _reads(start: Tensor, size: Tensor, length: int, bins: int, sampling: int) -> _Reads:
    """Reads of an axis of `length` pixels; only samples that may be inside are listed, as a box may be huge."""
    finite = (start.isfinite() & size.isfinite())[:, None, None]
    start, size = (torch.where(finite, t[:, None, None], 0.0) for t in (start, size))
    step = size / bins
    count = torch.full_like(step, float(sampling)) if sampling > 0 else step.ceil()
    pitch = step / count
    origin = start + torch.arange(bins, device=start.device)[:, None] * step
    first = ((-1 - origin) / pitch - 0.5).floor() - 1, ((length - origin) / pitch - 0.5).floor() + 3
    begin = torch.minimum(*first).nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)
    end = torch.minimum(torch.maximum(*first).nan_to_num(0.0, torch.inf, torch.inf), count)
    most = max(1, int((end - begin).max())) if start.numel() else 1
    n = begin + torch.arange(most, device=start.device)
    at = origin + (n + 0.5) * step / count
    inside = (n < count) & (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)
    low = at.floor()
    weights = [torch.where(inside, w / count, 0.0) for w in (1 - (at - low), at - low)]
    weights[0] = torch.where(finite, weights[0], torch.nan)
    low = torch.where(finite & inside, low, 0.0).long()
    return _Reads(low, (low + 1).clamp(max=length - 1), *weights)


def _bilinear(
    input: Tensor, boxes: Tensor, out_h: int, out_w: int, scale: float, sampling: int, aligned: bool, split: bool
) -> Tensor:
    """[K, C, out_h, out_w]; with `split` the channels are [C, out_h, out_w] and a bin reads its own."""
    boxes = boxes.double()
    (left, top), (right, bottom) = ((boxes[:, i : i + 2] * scale - (0.5 if aligned else 0.0)).unbind(1) for i in (1, 3))
    width, height = right - left, bottom - top
    if not aligned:
        width, height = width.clamp(min=1), height.clamp(min=1)
    rows = _reads(top, height, input.shape[2], out_h, sampling)
    cols = _reads(left, width, input.shape[3], out_w, sampling)
    wide = input if input.dtype == torch.float64 else input.float()
    pixels = wide.unflatten(1, (-1, out_h, out_w)).permute(0, 2, 3, 4, 5, 1) if split else wide.permute(0, 2, 3, 1)
    bins = tuple(torch.arange(n, device=input.device) for n in (out_h, out_w))
    place = (bins[0][:, None, None, None], bins[1][:, None]) if split else ()
    portion = max(1, PORTION // max(1, pixels.shape[-1] * rows.low[:1].numel() * cols.low[:1].numel()))
    image = boxes[:, 0].long()
    pooled = []
    for k in range(0, max(1, boxes.shape[0]), portion):
        part = slice(k, k + portion)
        total: Tensor | None = None
        for y, y_weight in ((rows.low, rows.low_weight), (rows.high, rows.high_weight)):
            for x, x_weight in ((cols.low, cols.low_weight), (cols.high, cols.high_weight)):
                at = (y[part, :, :, None, None], x[part, None, None])
                weight = y_weight[part, :, :, None, None] * x_weight[part, None, None]
                weight = weight.to(wide.dtype).unsqueeze(-1)
                reads = (image[part, None, None, None, None], *place, *at)
                values = pixels[reads]
                term = torch.where(weight != 0, weight * values, 0.0).sum((2, 4))
                total = term if total is None else total + term
        assert total is not None
        pooled.append(total)
    result = torch.cat(pooled).permute(0, 3, 1, 2).to(input.dtype)
    return result if channels_last(input) else result.contiguous()


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: OutputSize,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """The composition behind :func:`pydl.ops.roi_align`."""
    size = pair("roi_align", output_size)
    return _bilinear(input, boxes, *size, spatial_scale, sampling_ratio, aligned, False)
