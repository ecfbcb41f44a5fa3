"""Pairwise IoU and its relatives on every backend: values, gradients, degenerate boxes, layouts, torch's machinery."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _backends import available, backends_and_dtypes, backends_for
from _checks import (
    assert_same_bits,
    check_autocast,
    check_cases,
    check_compile,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    check_opcheck,
    check_same_error,
)

import pydl
from bench.bench_box_iou import composition
from pydl import ops
from pydl.reference import specs
from pydl.reference.box_iou import agreement, random_boxes

FUNCTIONS = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
KINDS = {"box_iou": "iou", **{f"{kind}_box_iou": kind for kind in ("generalized", "distance", "complete")}}
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
NAN, INF = float("nan"), float("inf")


def every(*dtypes, without=()):
    """Each backend of each function; the backend knows its op."""
    return [
        pytest.param(*p.values, id=f"{name}-{p.id}", marks=p.marks)
        for name in FUNCTIONS
        for p in backends_for(name, *dtypes, without=without)
    ]


def every_dtype(without=()):
    return [
        pytest.param(*p.values, id=f"{name}-{p.id}", marks=p.marks)
        for name in FUNCTIONS
        for p in backends_and_dtypes(name, without)
    ]


def wide_boxes(*shape, dtype=torch.float64, device="cpu"):
    """Boxes of very different sizes, of which only some overlap."""
    start = torch.rand(*shape, 2, dtype=torch.float64) * 60
    size = torch.rand(*shape, 2, dtype=torch.float64).square() * 40 + 0.5
    return torch.cat((start, start + size), -1).to(device, dtype)


def oracle(name, boxes1, boxes2, *args):
    arrays = [b.detach().double().cpu().numpy() for b in (boxes1, boxes2)]
    return torch.from_numpy(specs(name)[name].forward(*arrays, *args))


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), every_dtype())
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), every_dtype())
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients", lambda case: not backend.slow or case.arrays[1].size < 2000)


@pytest.mark.parametrize(("backend", "dtype"), every_dtype())
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize("backend", every(torch.float64))
def test_boxes_of_all_sizes(backend):
    # 130 x 71: two row tiles of 64 and a rest, a partial tile of columns
    n, m = (70, 35) if backend.slow else (130, 71)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 4e-6)):
        boxes1, boxes2 = wide_boxes(n, dtype=dtype).to(backend.device), wide_boxes(m, dtype=dtype).to(backend.device)
        boxes2[::7] = boxes1[: len(boxes2[::7])]
        y = backend(boxes1, boxes2)
        assert y.dtype == dtype and y.is_contiguous()
        torch.testing.assert_close(y.cpu().double(), oracle(backend.op, boxes1, boxes2), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_oracle_equals_a_composition_of_torch(name):
    boxes1, boxes2 = (wide_boxes(n).requires_grad_() for n in (23, 17))
    y = composition(name)(boxes1, boxes2)
    torch.testing.assert_close(y.detach(), oracle(name, boxes1, boxes2), rtol=1e-13, atol=1e-13)
    dy = torch.randn_like(y)
    arrays = [t.detach().numpy() for t in (dy, boxes1, boxes2)]
    expected = torch.autograd.grad(y, (boxes1, boxes2), dy)
    for ours, theirs in zip(specs(name)[name].gradient(*arrays), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-11, atol=1e-11)


def test_known_values():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [4.0, 0.0, 6.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.5, 0.5, 1.5, 1.5]])
    assert ops.box_iou(a, b).tolist()[0] == pytest.approx([1 / 3, 0, 1, 1 / 4])
    assert ops.generalized_box_iou(a, b).tolist()[0] == pytest.approx([1 / 3, -1 / 3, 1, 1 / 4])
    assert ops.distance_box_iou(a, b).tolist()[0] == pytest.approx([1 / 3 - 1 / 13, -16 / 40, 1, 1 / 4])
    assert ops.complete_box_iou(a, b).tolist()[0] == pytest.approx([1 / 3 - 1 / 13, -16 / 40, 1, 1 / 4])


# degenerate boxes


@pytest.mark.parametrize("backend", every(torch.float32))
def test_large_half_precision_boxes_do_not_overflow(backend):
    # areas near 2^32 overflow float16, and so do sums of two corners
    corners = [
        [0.0, 0.0, 65504.0, 65504.0],
        [-65504.0, -65504.0, 65504.0, 65504.0],
        [60000.0, 60000.0, 65504.0, 65504.0],
    ]
    low = torch.tensor(corners, dtype=torch.float16, device=backend.device)
    y = backend(low, low)
    assert y.dtype == torch.float32 and y.isfinite().all()
    torch.testing.assert_close(y.cpu().double(), oracle(backend.op, low, low), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_not_a_number_and_infinity(backend):
    boxes = wide_boxes(20, dtype=torch.float32)  # more than a vector, so that body and tail both answer
    boxes[3, 0], boxes[5, 3], boxes[17] = NAN, NAN, NAN
    boxes[7, 2], boxes[8, 1], boxes[9] = INF, -INF, torch.tensor([-INF, -INF, INF, INF])
    boxes[11], boxes[18] = torch.tensor([INF, INF, INF, INF]), torch.tensor([5.0, 5.0, 1.0, 9.0])
    given = boxes.to(backend.device)
    expected = oracle(backend.op, boxes, boxes)
    y = backend(given, given).cpu().double()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert y[3].isnan().all() and y[:, 5].isnan().all() and y[17].isnan().all()


@pytest.mark.parametrize("backend", every(torch.float32))
def test_boxes_without_area(backend):
    points = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.0], [2.0, 2.0, 4.0, 4.0]], device=backend.device)
    y = backend(points, points)
    torch.testing.assert_close(y.cpu().double(), oracle(backend.op, points, points), equal_nan=True)
    assert y[0, 0].isnan()  # 0 / 0, as in torchvision.ops


@pytest.mark.parametrize("backend", every(torch.float64))
def test_equal_and_touching_sides_share_the_gradient(backend):
    # integers in [0, 4): ties and touching sides everywhere, also boxes of no area
    corners = torch.randint(0, 4, (2, 12, 2, 2), dtype=torch.float64).sort(-2).values.reshape(2, 12, 4)
    size = corners[..., 2:] - corners[..., :2]
    corners[..., 2:] += (size == 0).double()
    boxes1, boxes2 = (c.to(backend.device).requires_grad_() for c in corners)
    y, expected = backend(boxes1, boxes2), composition(backend.op)(boxes1, boxes2)
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (boxes1, boxes2), dy), torch.autograd.grad(expected, (boxes1, boxes2), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# gradcheck


@pytest.mark.parametrize("backend", every(torch.float64))
def test_gradcheck(backend):
    boxes1, boxes2 = wide_boxes(3).to(backend.device), wide_boxes(4).to(backend.device)
    boxes2[0] = boxes1[0] + 0.3  # one pair overlaps for certain
    inputs = [boxes1.requires_grad_(), boxes2.requires_grad_()]
    if backend.op != "complete_box_iou":
        check_gradcheck(backend, inputs)
        return
    # the trade-off is a constant of the gradient, not of the value: the value is differenced with the trade-off held
    a, b = (t.detach().cpu().numpy() for t in inputs)
    iou, distance, complete = (agreement(kind, a[:, None], b, 1e-7) for kind in ("iou", "distance", "complete"))
    w1, h1, w2, h2 = (s.T for size in (a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]) for s in size.T)
    v = 4 / np.pi**2 * (np.arctan(w1 / h1)[:, None] - np.arctan(w2 / h2)) ** 2
    tradeoff = torch.from_numpy(v / (1 - iou + v + 1e-7)).to(backend.device)
    np.testing.assert_allclose(distance - tradeoff.cpu().numpy() * v, complete, rtol=1e-12)

    def held(boxes1, boxes2):
        sizes = [(t[:, 2] - t[:, 0], t[:, 3] - t[:, 1]) for t in (boxes1, boxes2)]
        angles = [torch.atan(w / h) for w, h in sizes]
        return ops.distance_box_iou(boxes1, boxes2) - tradeoff * 4 / np.pi**2 * (angles[0][:, None] - angles[1]) ** 2

    check_gradcheck(held, inputs)
    dy = torch.randn(3, 4, dtype=torch.float64, device=backend.device)
    wanted = torch.autograd.grad(held(*inputs), inputs, dy)
    for ours, theirs in zip(torch.autograd.grad(backend(*inputs), inputs, dy), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", every(torch.float64))
def test_second_and_third_derivatives_equal_torchs(backend):
    start = [wide_boxes(n).to(backend.device) for n in (5, 4)]
    start[1][:2] = start[0][:2] + torch.rand(2, 4, dtype=torch.float64, device=backend.device)

    def derivatives(function):
        leaves = [t.clone().requires_grad_() for t in start]
        y = function(*leaves)
        found = []
        for _ in range(3):
            y = (y * y).sum()  # the upstream gradient depends on the boxes too
            grads = torch.autograd.grad(y, leaves, create_graph=True)
            found += grads
            y = sum((g.sin() * i).sum() for i, g in enumerate(grads, 1))
        return found

    for ours, theirs in zip(derivatives(backend), derivatives(composition(backend.op)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_transforms(name):
    boxes1, boxes2 = wide_boxes(3), wide_boxes(4)
    ours, theirs = getattr(ops, name), composition(name)

    def loss(function):
        return lambda a, b: function(a, b).sin().sum()

    expected = torch.func.grad(loss(theirs), argnums=(0, 1))(boxes1, boxes2)
    for got, wanted in zip(torch.func.grad(loss(ours), argnums=(0, 1))(boxes1, boxes2), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.func.vmap(ours, (None, 0))(boxes1, boxes2.expand(2, 4, 4)), theirs(boxes1, boxes2).expand(2, 3, 4)
    )
    hessian = [torch.func.grad(lambda a: torch.func.grad(loss(f))(a, boxes2).sum())(boxes1) for f in (ours, theirs)]  # noqa: B023
    torch.testing.assert_close(*hessian)


# layouts, sizes and dtypes


@pytest.mark.parametrize(("backend", "dtype"), every_dtype(without=("torch",)))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, next(c for c in specs(backend.op)[backend.op].cases() if c.layouts))


@pytest.mark.parametrize("backend", every(torch.float32))
def test_edge_sizes(backend):
    # around the lanes of each vector, the tile of 64 rows, the tile of 512 columns, the block of 256 threads
    sizes = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 17), (65, 1)]
    sizes += [] if backend.slow else [(64, 16), (63, 15), (33, 511), (2, 513), (129, 257)]
    for n, m in sizes:
        boxes1, boxes2 = wide_boxes(n, dtype=torch.float32), wide_boxes(m, dtype=torch.float32)
        leaves = [b.to(backend.device).requires_grad_() for b in (boxes1, boxes2)]
        y = backend(*leaves)
        assert y.shape == (n, m)
        torch.testing.assert_close(y.detach().cpu().double(), oracle(backend.op, boxes1, boxes2), rtol=1e-4, atol=4e-6)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        arrays = [b.detach().double().numpy() for b in (boxes1, boxes2)]
        expected = specs(backend.op)[backend.op].gradient(np.ones((n, m)), *arrays)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours.cpu().double(), torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_leading_dimensions_are_broadcast(backend):
    boxes1, boxes2 = (wide_boxes(*s, dtype=torch.float32, device=backend.device) for s in ((2, 1, 3), (3, 1)))
    leaves = [boxes1.requires_grad_(), boxes2.requires_grad_()]
    y = backend(*leaves)
    assert y.shape == (2, 3, 3, 1)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(y[i, j], backend(boxes1[i, 0], boxes2[j]))
    assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [boxes1.shape, boxes2.shape]
    assert backend(boxes1[:0], boxes2).shape == (0, 3, 3, 1)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_integers_and_mixed_dtypes(backend):
    boxes = wide_boxes(6).round()
    for dtype in (torch.int64, torch.int32, torch.uint8):
        y = backend(boxes.to(backend.device, dtype), boxes.to(backend.device, dtype))
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.cpu().double(), oracle(backend.op, boxes, boxes), rtol=1e-5, atol=1e-5)
    for low, high, result in (
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.int64, torch.float64, torch.float64),
    ):
        y = backend(boxes.to(backend.device, low), boxes.to(backend.device, high))
        assert y.dtype == result
        torch.testing.assert_close(
            y.cpu().double(), oracle(backend.op, boxes.to(low), boxes.to(high)), rtol=1e-5, atol=1e-5
        )


# errors


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name):
    function, good = getattr(ops, name), torch.rand(3, 4)
    for bad in (torch.rand(3, 5), torch.rand(4), torch.rand(3, 4, dtype=torch.complex64), torch.ones(3, 4).bool()):
        shown = str(list(bad.shape)) if bad.shape != good.shape else str(bad.dtype)
        for args, argument in (((bad, good), "boxes1"), ((good, bad), "boxes2")):
            with pytest.raises(RuntimeError, match=argument) as raised:
                function(*args)
            assert name in str(raised.value) and shown in str(raised.value)
    with pytest.raises(TypeError, match=f"{name}.*boxes2.*list"):
        function(good, [[0.0, 0.0, 1.0, 1.0]])
    with pytest.raises(RuntimeError):
        function(torch.rand(2, 3, 4), torch.rand(3, 3, 4))
    check_same_error(function, composition(name), torch.rand(3, 4, dtype=torch.complex64), good)


def test_errors_of_options():
    good = torch.rand(3, 4)
    for bad in ("xyxyxyxy", "cxcywhr", "nonsense"):
        with pytest.raises(ValueError, match="box_iou.*fmt.*xyxy.*" + bad):
            ops.box_iou(good, good, bad)
    for name in FUNCTIONS[2:]:
        for eps in ("1e-7", None, True):
            with pytest.raises(TypeError, match=f"{name}.*eps.*{eps}"):
                getattr(ops, name)(good, good, eps)
        assert_same_bits(getattr(ops, name)(good, good, np.float32(0.5)), getattr(ops, name)(good, good, 0.5))


@pytest.mark.parametrize("backend", backends_for("box_iou", torch.float32, without=("torch",)))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    namespace = NAMESPACES[backend.name]
    boxes, dy = torch.zeros(3, 4, device=backend.device), torch.zeros(3, 3, device=backend.device)
    calls = [
        lambda: namespace.box_iou_fwd(boxes[:, :3], boxes, 0, 0.0),
        lambda: namespace.box_iou_fwd(boxes, boxes.double(), 0, 0.0),
        lambda: namespace.box_iou_fwd(boxes.long(), boxes.long(), 0, 0.0),
        lambda: namespace.box_iou_fwd(boxes, boxes[None], 0, 0.0),
        lambda: namespace.box_iou_fwd(boxes[0], boxes[0], 0, 0.0),
        lambda: namespace.box_iou_fwd(boxes.expand(2, 3, 4), boxes.expand(3, 3, 4), 0, 0.0),
        lambda: namespace.box_iou_fwd(boxes, boxes, 4, 0.0),
        lambda: namespace.box_iou_fwd(boxes, boxes, -1, 0.0),
        lambda: namespace.box_iou_bwd(dy[:2], boxes, boxes, 0, 0.0),
        lambda: namespace.box_iou_bwd(dy.double(), boxes, boxes, 0, 0.0),
        lambda: namespace.box_iou_bwd(dy.half(), boxes.half(), boxes.half(), 0, 0.0),
        lambda: namespace.box_iou_bwd(dy[None], boxes, boxes, 0, 0.0),
    ]
    with backend.use():
        for call in calls:
            with pytest.raises(RuntimeError):
                call()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available("box_iou") if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    boxes1, boxes2 = (wide_boxes(n, dtype=torch.float32).requires_grad_() for n in (3, 5))
    with backend.use():
        check_opcheck(namespace.box_iou_fwd.default, boxes1, boxes2, 0, 0.0)
        dy = torch.randn(3, 5, requires_grad=True)
        check_opcheck(namespace.box_iou_bwd.default, dy, boxes1, boxes2, 1, 1e-7)
        check_opcheck(
            namespace.box_iou_fwd.default, boxes1.detach().half()[None], boxes2.detach().half()[None], 3, 1e-7
        )


@pytest.mark.compile
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile(name):
    function = getattr(ops, name)
    check_compile(
        lambda a, b: function(a, b) * 2,
        [[wide_boxes(n, dtype=torch.float32), wide_boxes(m, dtype=torch.float32)] for n, m in ((3, 5), (7, 4))],
    )


@pytest.mark.compile
def test_compile_of_the_composition():
    def fn(a, b):
        with pydl.backend("torch"):
            return ops.generalized_box_iou(a, b)

    boxes1, boxes2 = wide_boxes(3, dtype=torch.float32), wide_boxes(5, dtype=torch.float32)
    compiled = torch.compile(ops.generalized_box_iou, fullgraph=True, backend="eager")
    with pydl.backend("torch"):
        torch.testing.assert_close(compiled(boxes1, boxes2), fn(boxes1, boxes2))


@pytest.mark.parametrize("backend", every(torch.float32))
def test_autocast(backend):
    boxes = wide_boxes(4, dtype=torch.float32, device=backend.device)
    for given in (boxes, boxes.bfloat16()):
        check_autocast(backend, composition(backend.op), given, given, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_deterministic(backend):
    # 70 rows: three groups of at most 32, whose sums are added in order
    boxes = [wide_boxes(n, dtype=torch.float32, device=backend.device) for n in (70, 19)]
    check_deterministic(backend, *boxes)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    boxes1, boxes2 = (wide_boxes(n, dtype=torch.float32).requires_grad_() for n in (301, 607))
    dy = torch.randn(301, 607)

    def run():
        y = ops.complete_box_iou(boxes1, boxes2)
        return [y.detach(), *torch.autograd.grad(y, (boxes1, boxes2), dy)]

    expected = run()
    try:
        torch.set_num_threads(threads)
        for ours, theirs in zip(run(), expected, strict=True):
            assert_same_bits(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_the_composition_takes_rows_in_parts():
    # 700 x 400 pairs: five parts; the same values and gradients as in one
    boxes1, boxes2 = (wide_boxes(n).requires_grad_() for n in (700, 400))
    with pydl.backend("torch"):
        y = ops.generalized_box_iou(boxes1, boxes2)
    expected = composition("generalized_box_iou")(boxes1, boxes2)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (boxes1, boxes2), dy), torch.autograd.grad(expected, (boxes1, boxes2), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_random_boxes_of_the_cases_overlap():
    boxes = random_boxes(np.random.default_rng(0), 50)
    assert agreement("iou", boxes[:, None], boxes).min() > 0.2
