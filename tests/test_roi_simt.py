"""The CUDA sources of RoI pooling, run by the SIMT host runner, against the CPU kernels; also under the sanitizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _simt import UNDER_ASAN, check_sanitized, load_simt_library

from pydl import ops  # noqa: F401  (defines the schemas of pydl_simt)
from pydl.reference._roi import random_boxes

CPU = torch.ops.pydl
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
if UNDER_ASAN:  # about ten times slower: bfloat16 has float16's addresses
    DTYPES = [torch.float32, torch.float16]
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
NAN, INF = float("nan"), float("inf")

# (N, C, H, W), boxes, (out_h, out_w), samples. 1, 3 and 5 channels fit no vector, 16 fit each, 48 and 130 leave blocks
# of channels over; 9 x 33 and 1 x 70 bins need several tiles of bins and several tables of weights, 20 x 37 pixels
# several tiles of pixels; 300 boxes are two chunks; adaptive samples of large boxes are more than a table holds.
SHAPES = [
    ((2, 3, 20, 37), 6, (9, 33), 2),
    ((1, 1, 9, 70), 3, (1, 70), 1),
    ((2, 16, 20, 37), 5, (7, 7), -1),
    ((1, 48, 9, 8), 4, (2, 3), 2),
    ((2, 130, 5, 6), 3, (3, 3), 2),
    ((3, 5, 6, 5), 300, (2, 2), 1),
    ((1, 2, 40, 90), 2, (1, 2), -1),
]
WILD = [
    [0, 2, 3, 2, 3],  # empty
    [1, 6, 5, 2, 1],  # inverted
    [0, -30, -30, -20, -20],  # beside the map
    [1, 1e30, 1e30, 2e30, 2e30],
    [0, -1e30, -1e30, 1e30, 1e30],  # with more samples than integers
    [1, NAN, 1, 5, 5],
    [0, 1, 1, INF, 5],
    [-1, 0, 0, 4, 4],  # images that do not exist
    [2, 0, 0, 4, 4],
    [1e30, 0, 0, 4, 4],
    [NAN, 0, 0, 4, 4],
]


@pytest.fixture(scope="module", autouse=True)
def simt():
    load_simt_library()
    return torch.ops.pydl_simt


def inputs(shape, count, layout):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(memory_format=layout)
    boxes = random_boxes(np.random.default_rng(count), count, shape[0], *shape[2:])
    return x, torch.from_numpy(boxes).float()


def assert_near(actual, wanted, layout):
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    assert actual.is_contiguous(memory_format=layout) and wanted.is_contiguous(memory_format=layout)
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        torch.testing.assert_close(actual, wanted, equal_nan=True)


@LAYOUTS
@pytest.mark.parametrize(("shape", "count", "size", "samples"), SHAPES, ids=str)
def test_values_of_roi_align(simt, shape, count, size, samples, layout):
    x, boxes = inputs(shape, count, layout)
    for dtype in DTYPES:
        given = x.to(dtype)
        rules = (0.75, samples, count % 2 == 0)
        y = simt.roi_align_fwd(given, boxes, *size, *rules)
        assert_near(y, CPU.roi_align_fwd(given, boxes, *size, *rules), layout)
        rest = (shape[0], *shape[2:], *rules, layout is torch.channels_last)
        assert_near(simt.roi_align_bwd(y, boxes, *rest), CPU.roi_align_bwd(y, boxes, *rest), layout)


# the same, with channels of the output; 17 x 18 bins need several tables
@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "count", "size", "samples"),
    [
        ((2, 3, 20, 37), 6, (3, 2), 2),
        ((1, 1, 6, 7), 3, (17, 18), 1),
        ((2, 5, 9, 13), 4, (2, 2), -1),
        ((3, 2, 6, 5), 300, (2, 1), 1),
    ],
    ids=str,
)
def test_values_of_ps_roi_align(simt, shape, count, size, samples, layout):
    n, c, h, w = shape
    x, boxes = inputs((n, c * size[0] * size[1], h, w), count, layout)
    for dtype in DTYPES:
        given, rest = x.to(dtype), (n, h, w, 0.75, samples, layout is torch.channels_last)
        y = simt.ps_roi_align_fwd(given, boxes, *size, 0.75, samples)
        assert_near(y, CPU.ps_roi_align_fwd(given, boxes, *size, 0.75, samples), layout)
        y = y.nan_to_num()
        assert_near(simt.ps_roi_align_bwd(y, boxes, *rest), CPU.ps_roi_align_bwd(y, boxes, *rest), layout)


@LAYOUTS
@pytest.mark.parametrize(("shape", "count", "size", "samples"), SHAPES, ids=str)
def test_values_of_roi_pool(simt, shape, count, size, samples, layout):
    x, boxes = inputs(shape, count, layout)
    x = x.mul(4).round()  # ties
    x[x > 6], x[x < -5] = NAN, -INF
    for dtype in DTYPES:
        given = x.to(dtype)
        y, argmax = simt.roi_pool_with_argmax(given, boxes, *size, 0.75)
        wanted, positions = CPU.roi_pool_with_argmax(given, boxes, *size, 0.75)
        assert_near(y, wanted, layout)
        assert torch.equal(argmax, positions) and argmax.is_contiguous(memory_format=layout)
        assert_near(simt.roi_pool_values(given, boxes, *size, 0.75), wanted, layout)
        dy, rest = y.clamp(-9, 9), (argmax, boxes, shape[0], *shape[2:], 0.75)
        assert_near(simt.roi_pool_bwd(dy, *rest), CPU.roi_pool_bwd(dy, *rest), layout)
        picked = simt.roi_pool_gather(given, argmax, boxes, 0.75)
        assert_near(picked, CPU.roi_pool_gather(given, argmax, boxes, 0.75), layout)


@LAYOUTS
@pytest.mark.parametrize("samples", [-1, 2])
@pytest.mark.parametrize("op", ["roi_align", "roi_align aligned", "ps_roi_align", "roi_pool"])
def test_values_of_wild_boxes_stay_in_memory(simt, op, samples, layout):
    x = torch.ones(2, 18, 9, 13).to(memory_format=layout)
    last = layout is torch.channels_last

    def run(namespace, boxes):
        if op == "roi_pool":
            y, argmax = namespace.roi_pool_with_argmax(x, boxes, 3, 2, 1.0)
            return y, namespace.roi_pool_bwd(torch.ones_like(y), argmax, boxes, 2, 9, 13, 1.0)
        name, rules = op.split()[0], (samples,) if op == "ps_roi_align" else (samples, op != "roi_align")
        y = getattr(namespace, f"{name}_fwd")(x, boxes, 3, 2, 1.0, *rules)
        return y, getattr(namespace, f"{name}_bwd")(torch.ones_like(y), boxes, 2, 9, 13, 1.0, *rules, last)

    for dtype in (torch.float32, torch.float64):
        boxes = torch.tensor(WILD, dtype=dtype)
        y, dx = run(simt, boxes)
        assert y[-6:].isnan().all()
        exists = (boxes[:, 0] >= 0) & (boxes[:, 0] < 2)
        wanted, gradient = run(CPU, boxes[exists])
        assert_near(y[exists], wanted, layout)
        assert_near(dx, gradient, layout)


@LAYOUTS
def test_values_of_wild_positions_stay_in_memory(simt, layout):
    boxes = torch.tensor([[0, 0, 0, 12, 8], [9, 0, 0, 12, 8]])
    for namespace in (simt, CPU):
        given = boxes[: 2 if namespace is simt else 1].float()
        for value in (-1, -(2**31), 9 * 13, 2**31 - 1, 0):
            argmax = torch.full((len(given), 8, 3, 2), value, dtype=torch.int32).to(memory_format=layout)
            dx = namespace.roi_pool_bwd(torch.ones(len(given), 8, 3, 2), argmax, given, 1, 9, 13, 1.0)
            y = namespace.roi_pool_gather(torch.ones(1, 8, 9, 13), argmax, given, 1.0)
            assert bool(dx.any()) == bool(y.any()) == (value == 0)
            assert not y[1:].any()


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN, reason="starts the sanitized process itself")
def test_all_of_the_above_under_the_sanitizers():
    check_sanitized(__file__)
