"""roi_pool on every backend: values, gradients, which pixels belong to a bin, layouts, errors, compilation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _backends import Backend, available, backends_and_dtypes, backends_for
from _checks import (
    assert_same_bits,
    check_autocast,
    check_cases,
    check_compile,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    check_opcheck,
    ops_called,
)
from _roi import (
    INF,
    LAYOUTS,
    NAMESPACES,
    NAN,
    NO_IMAGES,
    TORCH,
    check_images_that_do_not_exist,
    check_layout_is_kept,
    check_lists_of_boxes,
    check_no_gradient_of_boxes,
    check_raw_calls,
    check_refused,
    check_thread_counts,
    refused,
    some_boxes,
)

import pydl
from pydl import ops
from pydl.ops import _roi_torch
from pydl.reference._roi import rows_of
from pydl.reference.roi_pool import LOWEST, cases, roi_pool, roi_pool_grad, windows

OP = "roi_pool"
CASES = {case.name: case for case in cases()}


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
@pytest.mark.parametrize("level", ["values", "gradients", "second"])
def test_cases(backend, dtype, level):
    check_cases(backend, dtype, level)


def test_float32_and_float64_agree_about_the_windows_of_the_cases():
    for case in CASES.values():
        x, boxes, bins, *scale = case.args
        bins = (bins, bins) if isinstance(bins, int) else bins
        for _, *corners in rows_of(boxes)[np.isfinite(rows_of(boxes)).all(1)]:
            x1, y1, x2, y2 = (v * (scale or [1.0])[0] for v in corners)
            for low, high, length, count in ((y1, y2, x.shape[2], bins[0]), (x1, x2, x.shape[3], bins[1])):
                assert windows(low, high, length, count, np.float32) == windows(low, high, length, count), case.name


# a bin's first and last pixel along one axis, read off planes on which the maximum is the last or the first pixel
def ends_of(backend, low, high, length, bins, dtype):
    line = torch.arange(1.0, length + 1, device=backend.device, dtype=dtype)
    x = torch.stack([line, 1000 - line])[None, :, None, :]
    low, high = (torch.as_tensor(v, dtype=dtype, device=backend.device) for v in (low, high))
    zero = torch.zeros_like(low)
    last, first = backend(x, torch.stack([zero, low, zero, high, zero], 1), (1, bins)).squeeze(2).unbind(1)
    return torch.where(first > 0, 999 - first, 0).cpu(), last.cpu()


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_windows_are_those_of_the_arithmetic_of_the_input(backend, dtype):
    # 7 bins of 57 pixels: in float32 the last one ends at pixel 58, in float64 it does not
    kind = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    assert windows(0, 56, 99, 7, np.float32) != windows(0, 56, 99, 7, np.float64)
    sizes = [s for s in range(1, 64)] if backend.name != "simt" else [1, 2, 5, 6, 10, 57, 63]
    for bins in (1, 3, 7, 11):
        first, last = ends_of(backend, [2.0] * len(sizes), [s + 1.0 for s in sizes], 80, bins, dtype)
        for i, size in enumerate(sizes):
            wanted = windows(2.0, size + 1.0, 80, bins, kind)
            assert first[i].tolist() == [r.start for r in wanted], (size, bins)
            assert last[i].tolist() == [r.stop for r in wanted], (size, bins)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize(
    ("low", "high", "first", "stop"),
    [
        (1.0, 3.0, 1, 4),  # both bounds are in the box
        (1.49, 3.49, 1, 4),
        (1.5, 3.5, 2, 5),  # halves go up
        (-0.5, 2.0, 0, 3),  # and away from zero: from -1
        (0.49999997, 1.0, 0, 2),  # the last float32 before a half
        (2.0, 2.0, 2, 3),  # empty: one pixel
        (4.0, 1.0, 4, 5),  # inverted: one pixel, at the start
        (-7.0, 1.0, 0, 2),
        (6.0, 20.0, 6, 8),  # the map ends at 8
    ],
)
def test_bounds_are_rounded(backend, low, high, first, stop):
    start, end = ends_of(backend, [low], [high], 8, 1, torch.float32)
    assert (start.item(), end.item()) == (first, stop)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@LAYOUTS
def test_bins_beside_the_map_are_zero(backend, memory_format):
    x = torch.full((1, 5, 4, 4), -3.0, device=backend.device).contiguous(memory_format=memory_format).requires_grad_()
    boxes = torch.tensor([[0.0, -20, 0, -10, 3], [0, -4, -4, 3, 3], [0, -1e30, 2, 1e30, 3]], device=backend.device)
    y = backend(x, boxes, 2)
    assert not y[0].any()
    assert y[1, 0].tolist() == [[0.0, 0.0], [0.0, -3.0]]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.sum().item() == 5 * (y[:, 0] == -3).sum().item()


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@LAYOUTS
def test_ties_and_values_that_are_not_finite(backend, memory_format):
    x = torch.zeros(1, 17, 3, 4)
    x[0, 0] = torch.tensor([[1.0, 5, 2, 3], [5, 0, 5, 5], [4, 4, 4, 4]])  # ties: the first in row order
    x[0, 1] = torch.tensor([[NAN, NAN, 1, 2], [2, NAN, 2, 0], [0, 0, 0, 0]])  # NaN never wins
    x[0, 2], x[0, 3], x[0, 4] = NAN, -INF, LOWEST
    x[0, 16, 2, 3] = INF
    x = x.to(backend.device).contiguous(memory_format=memory_format).requires_grad_()
    y = backend(x, torch.tensor([[0, 0.0, 0, 3, 2]], device=backend.device), 1)
    values = y.flatten().tolist()
    assert values[:5] == [5.0, 2.0, LOWEST, LOWEST, LOWEST] and values[16] == INF
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[0, 0].flatten().tolist() == [0, 1] + [0] * 10
    assert dx[0, 1].flatten().tolist() == [0, 0, 0, 1] + [0] * 8
    assert not dx[0, 2:5].any() and dx[0, 16, 2, 3] == 1


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_boxes_that_are_not_finite_give_nan(backend):
    x = torch.randn(1, 3, 5, 5, device=backend.device, requires_grad=True)
    boxes = torch.tensor([[0, NAN, 1, 4, 4], [0, 1, 1, 4, INF], [0, 1, 1, 4, 4]], device=backend.device)
    y = backend(x, boxes, 2)
    assert y[:2].isnan().all() and y[2].isfinite().all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all() and dx.sum().item() == 12


@pytest.mark.parametrize("backend", backends_for(OP, torch.float16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@LAYOUTS
def test_low_precision_is_summed_in_float32(backend, low, memory_format):
    # 512 boxes over one pixel: ones added to 256 one by one would stop there in bfloat16
    x = torch.ones(1, 9, 3, 3, device=backend.device, dtype=low).contiguous(memory_format=memory_format)
    x.requires_grad_()
    boxes = torch.tensor([[0, 1.0, 1.0, 1.0, 1.0]], device=backend.device, dtype=low).expand(512, 5)
    (dx,) = torch.autograd.grad(backend(x, boxes, 1).sum(), x)
    assert (dx[0, :, 1, 1] == 512).all()


def test_positions_are_found_for_a_gradient_only():
    x, boxes = torch.randn(1, 2, 6, 6), torch.tensor([[0, 1.0, 1, 4, 5]])
    with ops_called() as plain:
        without = ops.roi_pool(x, boxes, 2)
    with ops_called() as recorded:
        with_gradient = ops.roi_pool(x.clone().requires_grad_(), boxes, 2)
    assert plain.pydl() == ["roi_pool_values"] and recorded.pydl() == ["roi_pool_with_argmax"]
    assert_same_bits(without, with_gradient.detach())


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_the_operator_of_values_has_a_gradient_too(backend, memory_format):
    x = torch.randn(2, 3, 6, 6, device=backend.device).contiguous(memory_format=memory_format).requires_grad_()
    boxes = some_boxes(4, 2, 6, 6, device=backend.device)
    with backend.use():
        y = NAMESPACES[backend.name].roi_pool_values(x, boxes, 2, 3, 1.0)
        (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(backend(x, boxes, (2, 3)).sum(), x)
    assert_same_bits(dx, expected)


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@LAYOUTS
def test_gradcheck(backend, memory_format):
    x = torch.randperm(80, dtype=torch.float64, device=backend.device).view(2, 2, 4, 5)  # no two are close
    x = x.contiguous(memory_format=memory_format)
    boxes = some_boxes(3, 2, 4, 5, torch.float64, backend.device)
    check_gradcheck(lambda t: backend(t, boxes, (2, 3)), [x.requires_grad_()])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_boxes_have_no_gradient(backend):
    check_no_gradient_of_boxes(backend, 2)


# boxes, layouts and edge sizes


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_a_list_of_boxes_has_one_entry_for_each_image(backend):
    check_lists_of_boxes(backend, 4)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["k7"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
# 1 has both layouts at once; vector widths +- 1; 130: blocks of 64 channels and a rest
@pytest.mark.parametrize("channels", [1, 2, 3, 16, 31, 32, 33, 65, 130])
def test_layout_is_kept(backend, channels):
    check_layout_is_kept(backend, channels, (2, 4))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_edge_sizes(backend, memory_format):
    # widths and bins around the vectors of 4, 8 and 16: whole, partial, shifted to the left, and larger than the map
    rng = np.random.default_rng(5)
    for width, bins in ((1, 1), (3, 16), (7, 8), (8, 4), (15, 16), (16, 2), (17, 32), (33, 8), (40, 4)):
        array = rng.standard_normal((1, 2, 4, width)).astype(np.float32).astype(np.float64)
        boxes = np.array([[0, 0, 0, width - 1, 3], [0, width - 2, 1, width, 3], [0, 0, 0, 1, 3]], dtype=np.float64)
        leaf = torch.from_numpy(array).float().contiguous(memory_format=memory_format).to(backend.device)
        y = backend(leaf.requires_grad_(), torch.from_numpy(boxes).float().to(backend.device), (8, bins))
        np.testing.assert_array_equal(y.detach().cpu().numpy(), roi_pool(array, boxes, (8, bins)))
        dy = torch.from_numpy(rng.integers(-4, 5, y.shape)).float()
        (dx,) = torch.autograd.grad(y, leaf, dy.to(backend.device))
        np.testing.assert_array_equal(dx.cpu().numpy(), *roi_pool_grad(dy.numpy(), array, boxes, (8, bins)))


@pytest.mark.parametrize("threads", [1, 2, 5])
@LAYOUTS
def test_every_thread_count_gives_the_same_bits(threads, memory_format):
    x = torch.randn(2, 70, 40, 41).contiguous(memory_format=memory_format)
    boxes = some_boxes(60, 2, 40, 41)
    check_thread_counts(threads, x, lambda t: ops.roi_pool(t, boxes, 7))


# errors


@refused()
def test_errors(arguments, error, says):
    check_refused(OP, arguments, error, says)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@NO_IMAGES
def test_images_that_do_not_exist(backend, image):
    check_images_that_do_not_exist(backend, image, 3)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    x, boxes = torch.zeros(1, 2, 4, 4, device=backend.device), torch.zeros(1, 5, device=backend.device)
    dy = torch.zeros(1, 2, 2, 2, device=backend.device)
    argmax = dy.int()
    calls = [
        *(
            (name, *args)
            for name in ("roi_pool_values", "roi_pool_with_argmax")
            for args in (
                (x[0], boxes, 2, 2, 1.0),
                (x.long(), boxes, 2, 2, 1.0),
                (x[..., :0], boxes, 2, 2, 1.0),
                (x[..., :1, :1].expand(1, 2, 2**16, 2**15), boxes, 2, 2, 1.0),
                (x, boxes[:, :4], 2, 2, 1.0),
                (x, boxes.half(), 2, 2, 1.0),
                (x, boxes, 0, 2, 1.0),
                (x, boxes, 2, 2**31, 1.0),
            )
        ),
        ("roi_pool_bwd", dy[0], argmax, boxes, 1, 4, 4, 1.0),
        ("roi_pool_bwd", dy.int(), argmax, boxes, 1, 4, 4, 1.0),
        ("roi_pool_bwd", dy[..., :1], argmax, boxes, 1, 4, 4, 1.0),
        ("roi_pool_bwd", dy, argmax.long(), boxes, 1, 4, 4, 1.0),
        ("roi_pool_bwd", dy, argmax, boxes.expand(2, 5), 1, 4, 4, 1.0),
        ("roi_pool_bwd", dy, argmax, boxes, -1, 4, 4, 1.0),
        ("roi_pool_bwd", dy, argmax, boxes, 1, 0, 4, 1.0),
        ("roi_pool_bwd", dy, argmax, boxes, 1, 2**16, 2**15, 1.0),
        ("roi_pool_gather", x[0], argmax, boxes, 1.0),
        ("roi_pool_gather", x.long(), argmax, boxes, 1.0),
        ("roi_pool_gather", x[:, :1], argmax, boxes, 1.0),
        ("roi_pool_gather", x, argmax[0], boxes, 1.0),
        ("roi_pool_gather", x, argmax, boxes.expand(2, 5), 1.0),
    ]
    check_raw_calls(backend, calls)


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(OP) if b.name in ("cpu", "simt")], ids=str)
@LAYOUTS
def test_opcheck(backend: Backend, memory_format):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        x = torch.randn(2, 3, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
        boxes = some_boxes(3, 2, 6, 5)
        check_opcheck(namespace.roi_pool_values.default, x, boxes, 2, 3, 0.5)
        check_opcheck(namespace.roi_pool_with_argmax.default, x, boxes, 2, 3, 0.5)
        y, argmax = namespace.roi_pool_with_argmax(x.detach(), boxes, 2, 3, 0.5)
        check_opcheck(namespace.roi_pool_bwd.default, y.requires_grad_(), argmax, boxes, 2, 6, 5, 0.5)
        check_opcheck(namespace.roi_pool_gather.default, x, argmax, boxes, 0.5)


@pytest.mark.compile
@LAYOUTS
def test_compile(memory_format):
    boxes = some_boxes(4, 1, 8, 6)

    def fn(x):
        return ops.roi_pool(x, boxes, (2, 3)) * 2

    check_compile(
        fn, [[torch.randn(*s).contiguous(memory_format=memory_format)] for s in ((2, 3, 8, 8), (1, 3, 11, 6))]
    )


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    x, boxes = torch.randn(1, 2, 6, 6, device=backend.device), torch.tensor([[0, 1.0, 1, 4, 5]], device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(backend, _roi_torch.roi_pool, given, boxes, 2, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_deterministic(backend, memory_format):
    x = torch.randn(1, 5, 12, 13, device=backend.device).contiguous(memory_format=memory_format)
    boxes = some_boxes(30, 1, 12, 13, device=backend.device)  # dozens overlap at each pixel
    check_deterministic(lambda t: backend(t, boxes, 3), x)


def test_module():
    x, boxes = torch.randn(1, 2, 6, 6), torch.tensor([[0, 1.0, 1, 4, 5]])
    module = pydl.nn.RoIPool((3, 2), 0.5)
    assert_same_bits(module(x, boxes), ops.roi_pool(x, boxes, (3, 2), 0.5))
    assert_same_bits(module(x, [boxes[:, 1:]]), module(x, boxes))
    assert repr(module) == "RoIPool(output_size=(3, 2), spatial_scale=0.5)"
    assert not module.state_dict()
    assert [node.op for node in torch.fx.symbolic_trace(module).graph.nodes].count("call_function") == 1
