"""IoU losses on every backend: values, gradients, degenerate boxes, reductions, torch's machinery."""

from __future__ import annotations

import math

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

from bench.bench_box_iou_loss import composition
from pydl import ops
from pydl.reference import specs

FUNCTIONS = ("generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss")
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
NAN, INF = float("nan"), float("inf")


def every(*dtypes, without=()):
    """Each backend of each loss; the backend knows its op."""
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


def near_boxes(*shape, dtype=torch.float64, device="cpu"):
    """Boxes and others some pixels from them, a few of which no longer overlap."""
    start = torch.rand(*shape, 2, dtype=torch.float64) * 60
    boxes = torch.cat((start, start + torch.rand(*shape, 2, dtype=torch.float64) * 20 + 2), -1)
    moved = boxes + torch.randn(*shape, 1, dtype=torch.float64) * 6 + torch.rand(*shape, 4, dtype=torch.float64)
    return boxes.to(device, dtype), moved.to(device, dtype)


def oracle(name, boxes1, boxes2, *args):
    arrays = [b.detach().double().cpu().numpy() for b in (boxes1, boxes2)]
    return torch.from_numpy(np.asarray(specs(name)[name].forward(*arrays, *args)))


def gradients(function, boxes1, boxes2, dloss=None, **kwargs):
    leaves = [b.detach().clone().requires_grad_() for b in (boxes1, boxes2)]
    loss = function(*leaves, **kwargs)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss) if dloss is None else dloss)


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), every_dtype())
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), every_dtype())
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients")


@pytest.mark.parametrize(("backend", "dtype"), every_dtype())
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_oracle_equals_a_composition_of_torch(name):
    boxes1, boxes2 = near_boxes(50)
    dloss = torch.randn(50, dtype=torch.float64)
    loss, *grads = gradients(composition(name), boxes1, boxes2, dloss)
    torch.testing.assert_close(loss, oracle(name, boxes1, boxes2), rtol=1e-13, atol=1e-13)
    arrays = [t.numpy() for t in (dloss, boxes1, boxes2)]
    for ours, theirs in zip(specs(name)[name].gradient(*arrays), grads, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-11, atol=1e-11)


def test_known_values():
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])
    assert ops.generalized_box_iou_loss(a, b).item() == pytest.approx(2 / 3)
    assert ops.distance_box_iou_loss(a, b).item() == pytest.approx(2 / 3 + 1 / 13)
    assert ops.complete_box_iou_loss(a, b).item() == pytest.approx(2 / 3 + 1 / 13)
    flat = torch.tensor([0.0, 0.0, 4.0, 1.0])
    v = 4 / math.pi**2 * (math.atan(4) - math.atan(1)) ** 2
    expected = 2 / 3 + (1**2 + 0.5**2) / (4**2 + 2**2) + v * v / (2 / 3 + v)
    assert ops.complete_box_iou_loss(a, flat).item() == pytest.approx(expected)


# degenerate boxes


@pytest.mark.parametrize("backend", every(torch.float32))
def test_degenerate_boxes_have_finite_losses_and_gradients(backend):
    # points, lines, boxes whose corners are swapped, boxes too thin for the square of their width to be a number
    side = [0.0, 1.0, 1e-3, 1e-19, 1e-23, 3e-39, -1.0]
    sizes = torch.tensor([[w, h] for w in side for h in side])
    first = torch.cat((torch.zeros_like(sizes), sizes), -1)
    n = len(first)
    boxes1, boxes2 = first.repeat_interleave(n, 0).to(backend.device), first.repeat(n, 1).to(backend.device)
    # where swapped corners make the union -1e-7 or so, the formula itself divides by nothing
    union = (boxes1[:, 2] * boxes1[:, 3] + boxes2[:, 2] * boxes2[:, 3]).double()
    keep = union.gt(-1e-12)
    loss, *grads = gradients(backend, boxes1[keep], boxes2[keep])
    assert loss.isfinite().all()
    for grad in grads:
        assert grad.isfinite().all(), boxes1[keep][~grad.isfinite().all(-1)][:4]


@pytest.mark.parametrize("backend", every(torch.float32))
def test_a_point_against_a_box(backend):
    point, box = torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    for pair in ((point, box), (box, point), (point, point)):
        given = [b.to(backend.device) for b in pair]
        loss, *grads = gradients(backend, *given)
        torch.testing.assert_close(loss.cpu().double(), oracle(backend.op, *pair), rtol=1e-5, atol=1e-6)
        arrays = [b.double().numpy() for b in pair]
        expected = specs(backend.op)[backend.op].gradient(np.ones(1), *arrays)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours.cpu().double(), torch.from_numpy(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_identical_boxes(backend):
    boxes, _ = near_boxes(20, dtype=torch.float32, device=backend.device)
    loss, *grads = gradients(backend, boxes, boxes)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_large_half_precision_boxes_do_not_overflow(backend):
    boxes = torch.tensor([[0.0, 0.0, 65504.0, 65504.0], [-65504.0, -65504.0, 65504.0, 65504.0]])
    low = boxes.to(backend.device, torch.float16)
    loss, *grads = gradients(backend, low, low.flip(0))
    assert loss.dtype == torch.float32 and grads[0].dtype == torch.float16
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(loss.cpu().double(), oracle(backend.op, low, low.flip(0)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_not_a_number_and_infinity(backend):
    boxes, moved = near_boxes(20, dtype=torch.float32)
    boxes[3, 0], moved[5, 3], boxes[17] = NAN, NAN, NAN
    boxes[7, 2], moved[8, 1] = INF, -INF
    boxes[18] = torch.tensor([5.0, 5.0, 1.0, 9.0])
    loss = backend(boxes.to(backend.device), moved.to(backend.device)).cpu().double()
    expected = oracle(backend.op, boxes, moved)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert loss[[3, 5, 17]].isnan().all()


# gradcheck


@pytest.mark.parametrize("backend", every(torch.float64))
def test_gradcheck(backend):
    # 3 and 10 pairs: less and more than a vector of doubles
    for n in (3, 10):
        boxes1, boxes2 = near_boxes(n, device=backend.device)
        inputs = [boxes1.requires_grad_(), boxes2.requires_grad_()]
        if backend.op != "complete_box_iou_loss":
            check_gradcheck(backend, inputs, second=n == 3)
            continue
        # the trade-off is a constant of the gradient: the value is differenced with the trade-off held
        sizes = [(b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]) for b in inputs]
        v = 4 / math.pi**2 * (torch.atan(sizes[0][0] / sizes[0][1]) - torch.atan(sizes[1][0] / sizes[1][1])) ** 2
        gap = ops.complete_box_iou_loss(*inputs) - ops.distance_box_iou_loss(*inputs)
        tradeoff = (gap / v).detach()

        def held(a, b, tradeoff=tradeoff):
            angles = [torch.atan((t[:, 2] - t[:, 0]) / (t[:, 3] - t[:, 1])) for t in (a, b)]
            return ops.distance_box_iou_loss(a, b) + tradeoff * 4 / math.pi**2 * (angles[0] - angles[1]) ** 2

        check_gradcheck(held, inputs, second=False)
        for ours, theirs in zip(gradients(backend, *inputs), gradients(held, *inputs), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", every(torch.float64))
def test_second_and_third_derivatives_equal_torchs(backend):
    start = near_boxes(6, device=backend.device)

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
    boxes1, boxes2 = near_boxes(4)
    ours, theirs = getattr(ops, name), composition(name)

    def loss(function):
        return lambda a: function(a, boxes2).sin().sum()

    torch.testing.assert_close(torch.func.grad(loss(ours))(boxes1), torch.func.grad(loss(theirs))(boxes1))
    torch.testing.assert_close(torch.func.vmap(ours)(boxes1, boxes2), theirs(boxes1, boxes2))
    second = [torch.func.grad(lambda a: torch.func.grad(loss(f))(a).sum())(boxes1) for f in (ours, theirs)]  # noqa: B023
    torch.testing.assert_close(*second)


# layouts, sizes, reductions and dtypes


@pytest.mark.parametrize(("backend", "dtype"), every_dtype(without=("torch",)))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, next(c for c in specs(backend.op)[backend.op].cases() if c.layouts))


@pytest.mark.parametrize("backend", every(torch.float32))
def test_edge_sizes(backend):
    # around the lanes of each vector and the block of 256 threads
    for n in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 257):
        boxes1, boxes2 = near_boxes(n, dtype=torch.float32)
        loss, *grads = gradients(backend, boxes1.to(backend.device), boxes2.to(backend.device))
        torch.testing.assert_close(loss.cpu().double(), oracle(backend.op, boxes1, boxes2), rtol=1e-4, atol=4e-6)
        arrays = [b.double().numpy() for b in (boxes1, boxes2)]
        for ours, theirs in zip(grads, specs(backend.op)[backend.op].gradient(np.ones(n), *arrays), strict=True):
            torch.testing.assert_close(ours.cpu().double(), torch.from_numpy(theirs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", every(torch.float64))
def test_reductions(backend):
    boxes1, boxes2 = near_boxes(37, device=backend.device)
    each = gradients(backend, boxes1, boxes2)
    for reduction, share in (("sum", 1.0), ("mean", 1 / 37)):
        found = gradients(backend, boxes1, boxes2, reduction=reduction)
        assert found[0].shape == ()
        torch.testing.assert_close(found[0], each[0].sum() * share)
        for ours, whole in zip(found[1:], each[1:], strict=True):
            torch.testing.assert_close(ours, whole * share)
    for reduction in ("sum", "mean"):  # of no boxes 0, not NaN, with a gradient
        found = gradients(backend, boxes1[:0], boxes2[:0], reduction=reduction)
        assert found[0].item() == 0.0 and found[1].shape == (0, 4)


@pytest.mark.parametrize("backend", every(torch.float64))
def test_shapes_are_broadcast(backend):
    boxes1, boxes2 = near_boxes(5, device=backend.device)
    one = gradients(backend, boxes1, boxes2[:1])
    torch.testing.assert_close(one[0], backend(boxes1, boxes2[:1].expand(5, 4)))
    assert one[2].shape == (1, 4)
    whole = gradients(backend, boxes1, boxes2[:1].expand(5, 4).clone())
    torch.testing.assert_close(one[2], whole[2].sum(0, keepdim=True))
    assert backend(boxes1[0], boxes2[0]).shape == ()


@pytest.mark.parametrize("backend", every(torch.float32))
def test_integers_and_mixed_dtypes(backend):
    boxes1, boxes2 = (b.round().to(backend.device) for b in near_boxes(6))
    expected = oracle(backend.op, boxes1, boxes2)
    for first, second, result in (
        (torch.int64, torch.int64, torch.float32),
        (torch.int32, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        loss = backend(boxes1.to(first), boxes2.to(second))
        assert loss.dtype == result
        torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", every(torch.float64))
def test_eps_is_used(backend):
    boxes1, boxes2 = near_boxes(9, device=backend.device)
    torch.testing.assert_close(backend(boxes1, boxes2, eps=20.0), composition(backend.op)(boxes1, boxes2, eps=20.0))


# errors


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name):
    function, good = getattr(ops, name), torch.rand(3, 4)
    for bad in (torch.rand(3, 5), torch.rand(()), torch.rand(3, 4, dtype=torch.complex64), torch.ones(3, 4).bool()):
        shown = str(list(bad.shape)) if bad.shape != good.shape else str(bad.dtype)
        for args, argument in (((bad, good), "boxes1"), ((good, bad), "boxes2")):
            with pytest.raises(RuntimeError, match=argument) as raised:
                function(*args)
            assert name in str(raised.value) and shown in str(raised.value)
    with pytest.raises(TypeError, match=f"{name}.*boxes2.*list"):
        function(good, [[0.0, 0.0, 1.0, 1.0]])
    with pytest.raises(ValueError, match=f"{name}.*reduction.*none, mean, sum.*'average'"):
        function(good, good, "average")
    with pytest.raises(TypeError, match=f"{name}.*eps.*None"):
        function(good, good, eps=None)
    check_same_error(function, composition(name), torch.rand(3, 4), torch.rand(2, 4), says=[name, "boxes2", "[2, 4]"])


@pytest.mark.parametrize("backend", backends_for(FUNCTIONS[0], torch.float32, without=("torch",)))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    namespace = NAMESPACES[backend.name]
    boxes, dloss = torch.zeros(3, 4, device=backend.device), torch.zeros(3, device=backend.device)
    calls = [
        lambda: namespace.box_iou_loss_fwd(boxes[:, :3], boxes[:, :3], 1, 0.0),
        lambda: namespace.box_iou_loss_fwd(boxes, boxes[:2], 1, 0.0),
        lambda: namespace.box_iou_loss_fwd(boxes, boxes.double(), 1, 0.0),
        lambda: namespace.box_iou_loss_fwd(boxes.long(), boxes.long(), 1, 0.0),
        lambda: namespace.box_iou_loss_fwd(boxes, boxes, 4, 0.0),
        lambda: namespace.box_iou_loss_fwd(boxes[0, 0], boxes[0, 0], 1, 0.0),
        lambda: namespace.box_iou_loss_bwd(dloss[:2], boxes, boxes, 1, 0.0),
        lambda: namespace.box_iou_loss_bwd(dloss[:1], boxes, boxes, 1, 0.0),
        lambda: namespace.box_iou_loss_bwd(dloss.sum(), boxes, boxes, 1, 0.0),
        lambda: namespace.box_iou_loss_bwd(dloss.double(), boxes, boxes, 1, 0.0),
        lambda: namespace.box_iou_loss_bwd(dloss.half(), boxes.half(), boxes.half(), 1, 0.0),
    ]
    with backend.use():
        for call in calls:
            with pytest.raises(RuntimeError):
                call()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(FUNCTIONS[0]) if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    boxes1, boxes2 = (b.requires_grad_() for b in near_boxes(5, dtype=torch.float32))
    with backend.use():
        check_opcheck(namespace.box_iou_loss_fwd.default, boxes1, boxes2, 2, 1e-7)
        dloss = torch.randn(5, requires_grad=True)
        check_opcheck(namespace.box_iou_loss_bwd.default, dloss, boxes1, boxes2, 1, 1e-7)
        check_opcheck(namespace.box_iou_loss_fwd.default, boxes1.detach().half(), boxes2.detach().half(), 3, 1e-7)


@pytest.mark.compile
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile(name):
    function = getattr(ops, name)
    check_compile(lambda a, b: function(a, b, "mean") * 2, [list(near_boxes(n, dtype=torch.float32)) for n in (5, 9)])


@pytest.mark.parametrize("backend", every(torch.float32))
def test_autocast(backend):
    boxes1, boxes2 = near_boxes(4, dtype=torch.float32, device=backend.device)
    for given in ((boxes1, boxes2), (boxes1.bfloat16(), boxes2.bfloat16())):
        check_autocast(backend, composition(backend.op), *given, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_deterministic(backend):
    check_deterministic(backend, *near_boxes(300, dtype=torch.float32, device=backend.device))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    pair = near_boxes(20011, dtype=torch.float32)
    expected = gradients(ops.complete_box_iou_loss, *pair)
    try:
        torch.set_num_threads(threads)
        for ours, theirs in zip(gradients(ops.complete_box_iou_loss, *pair), expected, strict=True):
            assert_same_bits(ours, theirs)
    finally:
        torch.set_num_threads(before)
