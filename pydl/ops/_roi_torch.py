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
    none: Tensor  # [K], whether the box has no samples


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
    none = ((count == 0) & finite)[:, 0, 0]
    return _Reads(low, (low + 1).clamp(max=length - 1), weights[0], weights[1], none)


def _portions(boxes: Tensor, elements: int) -> list[slice]:
    """Slices of the boxes, so that an intermediate with so many elements for each stays small."""
    portion = max(1, PORTION // max(1, elements))
    return [slice(k, k + portion) for k in range(0, max(1, boxes.shape[0]), portion)]


def _assembled(pooled: list[Tensor], input: Tensor) -> Tensor:
    """Portions [K, out_h, out_w, C] as one [K, C, out_h, out_w] in the dtype and layout of the input."""
    result = torch.cat(pooled).permute(0, 3, 1, 2).to(input.dtype)
    return result if channels_last(input) else result.contiguous()


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
    image = boxes[:, 0].long()
    pooled = []
    for part in _portions(boxes, pixels.shape[-1] * rows.low[:1].numel() * cols.low[:1].numel()):
        total: Tensor | None = None
        for y, y_weight in ((rows.low, rows.low_weight), (rows.high, rows.high_weight)):
            for x, x_weight in ((cols.low, cols.low_weight), (cols.high, cols.high_weight)):
                at = (y[part, :, :, None, None], x[part, None, None])
                factors = y_weight[part, :, :, None, None], x_weight[part, None, None]
                used = (factors[0] != 0) & (factors[1] != 0)  # 0 times a weight of NaN is no 0
                weight = torch.where(used, factors[0] * factors[1], 0.0).to(wide.dtype).unsqueeze(-1)
                reads = (image[part, None, None, None, None], *place, *at)
                values = pixels[reads]
                term = torch.where(weight != 0, weight * values, 0.0).sum((2, 4))
                total = term if total is None else total + term
        assert total is not None
        pooled.append(total)
    result = _assembled(pooled, input)
    return torch.where((rows.none | cols.none)[:, None, None, None], torch.nan, result) if split else result


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


def ps_roi_align(
    input: Tensor, boxes: Tensor, output_size: OutputSize, spatial_scale: float = 1.0, sampling_ratio: int = -1
) -> Tensor:
    """The composition behind :func:`pydl.ops.ps_roi_align`."""
    size = pair("ps_roi_align", output_size)
    return _bilinear(input, boxes, *size, spatial_scale, sampling_ratio, True, True)


class _Windows(NamedTuple):
    """Pixels of each bin along one axis, [K, bins, most], which of them are in it, and whether the box is finite."""

    pixels: Tensor
    inside: Tensor
    finite: Tensor


def _nearest(v: Tensor) -> Tensor:
    """The nearest integer, halves away from 0."""
    whole = v.trunc()
    return torch.where((v - whole).abs() >= 0.5, whole + v.sign(), whole)


def _windows(low: Tensor, high: Tensor, length: int, bins: int) -> _Windows:
    """Windows of max pooling between scaled bounds; in the dtype of these, as rounding decides about a pixel."""
    far = 2.0**40  # sums of coordinates stay exact
    start, end = (_nearest(t).double() for t in (low, high))
    finite = start.isfinite() & end.isfinite()
    start, end = (t.nan_to_num(0.0).clamp(-far, far) for t in (start, end))
    size = (end - start + 1).clamp(min=1).to(low.dtype)
    step = (size / torch.full_like(size, bins))[:, None]  # by a tensor: a division by a number may be a product
    bin = torch.arange(bins + 1, device=low.device, dtype=low.dtype)
    first = ((bin[:-1] * step).floor().long() + start.long()[:, None]).clamp(0, length)
    stop = ((bin[1:] * step).ceil().long() + start.long()[:, None]).clamp(0, length)
    most = max(1, int((stop - first).max())) if low.numel() else 1
    pixels = first[..., None] + torch.arange(most, device=low.device)
    return _Windows(pixels.clamp(max=length - 1), pixels < stop[..., None], finite)


def roi_pool(input: Tensor, boxes: Tensor, output_size: OutputSize, spatial_scale: float = 1.0) -> Tensor:
    """The composition behind :func:`pydl.ops.roi_pool`."""
    out_h, out_w = pair("roi_pool", output_size)
    left, top, right, bottom = (boxes[:, 1:] * spatial_scale).unbind(1)
    rows, cols = _windows(top, bottom, input.shape[2], out_h), _windows(left, right, input.shape[3], out_w)
    pixels = (input if input.dtype == torch.float64 else input.float()).permute(0, 2, 3, 1)
    image, lowest = boxes[:, 0].long(), torch.finfo(torch.float32).min
    pooled = []
    for part in _portions(boxes, pixels.shape[-1] * rows.pixels[:1].numel() * cols.pixels[:1].numel()):
        at = image[part, None, None, None, None], rows.pixels[part, :, None, :, None], cols.pixels[part, None, :, None]
        inside = rows.inside[part, :, None, :, None] & cols.inside[part, None, :, None]
        values = pixels[at]
        values = torch.where(inside.unsqueeze(-1) & (values > lowest), values, lowest)  # NaN is not above it
        best = values.flatten(3, 4).max(3).values
        best = torch.where(inside.any(4).any(3).unsqueeze(-1), best, 0.0)
        lost = ~(rows.finite & cols.finite)[part, None, None, None]
        pooled.append(torch.where(lost, torch.nan, best))
    return _assembled(pooled, input)
