"""Boxes, the oracle's answers in the precision of the kernels, and exact comparison with them."""

from __future__ import annotations

import numpy as np
import torch

from pydl.reference.nms import batched_nms, nms, random_boxes


def numpy(tensor):
    """As the kernels compute: float64 stays, everything below is float32."""
    if not tensor.is_floating_point():
        return tensor.cpu().numpy()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy()


def oracle(boxes, scores, threshold, idxs=None):
    if idxs is None:
        return nms(numpy(boxes), numpy(scores), threshold)
    return batched_nms(numpy(boxes), numpy(scores), numpy(idxs), threshold)


def assert_kept(backend, boxes, scores, threshold, idxs=None):
    """The backend's nms or batched_nms is the oracle's, on the backend's device."""
    args = [t.to(backend.device) for t in (boxes, scores, *([] if idxs is None else [idxs]))]
    kept = backend(*args, threshold)
    assert kept.dtype == torch.int64 and kept.device == args[0].device
    assert np.array_equal(kept.cpu().numpy(), oracle(boxes, scores, threshold, idxs))


def boxes_of(n, dtype=torch.float32, seed=0, extent=None):
    """Boxes of which each meets about as many others, however many there are, and scores with some ties."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, n, extent=extent or max(40.0, 12 * n**0.5))
    scores = np.round(rng.uniform(0, 1, n) * 2 * n) / (2 * n + 1)
    return torch.from_numpy(boxes).to(dtype), torch.from_numpy(scores).to(dtype)
