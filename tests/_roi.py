"""What the tests of RoI pooling share: boxes, the two layouts, calls that are refused, checks that hold for each op."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _backends import Backend
from _checks import assert_same_bits

from pydl import ops
from pydl.reference._roi import random_boxes

TORCH = ("torch",)
NAN, INF = float("nan"), float("inf")
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
CHANNELS_LAST = torch.channels_last
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
NO_IMAGES = pytest.mark.parametrize("image", [-1.0, 2.0, 1e30, INF, NAN])


def some_boxes(count, images, height, width, dtype=torch.float32, device="cpu"):
    return torch.from_numpy(random_boxes(np.random.default_rng(3), count, images, height, width)).to(device, dtype)


# arguments that every op refuses, over an input [1, 1, 4, 4], one box and output_size 1
REFUSED = [
    (dict(input=[1.0]), TypeError, ["input", "list"]),
    (dict(input=torch.zeros(1, 4, 4)), RuntimeError, ["input", "[N, C, H, W]", "[1, 4, 4]"]),
    (dict(input=torch.zeros(1, 1, 0, 4)), RuntimeError, ["input", "H, W > 0", "[1, 1, 0, 4]"]),
    (dict(input=torch.zeros(1, 1, 4, 4, dtype=torch.int64)), RuntimeError, ["input", "floating", "int64"]),
    (dict(boxes=3), AssertionError, ["boxes", "int"]),
    (dict(boxes=torch.zeros(5)), AssertionError, ["boxes", "[K, 5]", "[5]"]),
    (dict(boxes=torch.zeros(2, 4)), AssertionError, ["boxes", "[K, 5]", "[2, 4]"]),
    (dict(boxes=[torch.zeros(2, 5)]), AssertionError, ["boxes", "[L, 4]", "[2, 5]"]),
    (dict(boxes=[[0, 0, 1, 1]]), AssertionError, ["boxes", "[L, 4]", "list"]),
    (dict(boxes=[torch.zeros(1, 4)] * 2), RuntimeError, ["boxes", "each of 1 images", "2"]),
    (dict(boxes=torch.zeros(1, 5, dtype=torch.float64)), RuntimeError, ["boxes", "float32", "float64"]),
    (dict(boxes=torch.zeros(1, 5, dtype=torch.int64)), RuntimeError, ["boxes", "dtype", "int64"]),
    (dict(output_size=0), RuntimeError, ["output_size", "0"]),
    (dict(output_size=(3, -1)), RuntimeError, ["output_size", "(3, -1)"]),
    (dict(output_size=(1, 2, 3)), RuntimeError, ["output_size", "(1, 2, 3)"]),
    (dict(output_size=2.5), TypeError, ["output_size", "2.5"]),
    (dict(spatial_scale="1"), TypeError, ["spatial_scale", "'1'"]),
]
REFUSED_SAMPLINGS = [
    (dict(sampling_ratio=1.5), TypeError, ["sampling_ratio", "1.5"]),
    (dict(sampling_ratio=2**31), RuntimeError, ["sampling_ratio", "2^31"]),
]


def refused(*more):
    """pytest parameters (arguments, error, says) of what an op refuses."""
    return pytest.mark.parametrize(
        ("arguments", "error", "says"),
        [*REFUSED, *more],
        ids=lambda v: ",".join(v) if isinstance(v, (list, dict)) else "",
    )


def check_refused(op, arguments, error, says):
    arguments = {"input": torch.zeros(1, 1, 4, 4), "boxes": torch.zeros(1, 5), "output_size": 1, **arguments}
    with pytest.raises(error) as raised:
        getattr(ops, op)(**arguments)
    assert type(raised.value) is error
    for part in (op, *says):
        assert part in str(raised.value)


def check_raw_calls(backend: Backend, calls):
    """Each of the calls (operator, arguments...), which pass garbage, is refused."""
    with backend.use():
        for name, *args in calls:
            with pytest.raises(RuntimeError):
                getattr(NAMESPACES[backend.name], name)(*args)


def check_lists_of_boxes(backend: Backend, channels):
    """One entry for each image, in a list or a tuple; fewer and none, too."""
    x = torch.randn(3, channels, 9, 8, device=backend.device)
    rows = some_boxes(5, 3, 9, 8, device=backend.device)
    rows = rows[rows[:, 0].argsort(stable=True)]
    parts = [rows[rows[:, 0] == n, 1:] for n in range(3)]
    assert_same_bits(backend(x, parts, 3), backend(x, rows, 3))
    assert_same_bits(backend(x, tuple(parts), (3, 3)), backend(x, rows, [3, 3]))
    assert_same_bits(backend(x, parts[:1], 3), backend(x, rows[rows[:, 0] == 0], 3))
    nothing = (0, *backend(x, rows, 3).shape[1:])
    assert backend(x, [rows[:0, 1:]] * 3, 3).shape == nothing
    assert backend(x, [], 3).shape == nothing


def check_images_that_do_not_exist(backend: Backend, image, channels):
    """An error on the CPU, NaN on a device that would have to be waited for; no gradient either way."""
    x = torch.randn(2, channels, 5, 5, device=backend.device, requires_grad=True)
    boxes = torch.tensor([[image, 0, 0, 4, 4], [1, 0, 0, 4, 4]], device=backend.device)
    if backend.name == "cpu":
        with pytest.raises(RuntimeError, match=r"boxes.*images in \[0, 2\).*row 0"):
            backend(x, boxes, 2)
        return
    y = backend(x, boxes, 2)
    assert y[0].isnan().all() and y[1].isfinite().all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all() and not dx[0].any() and dx[1].any()


def check_layout_is_kept(backend: Backend, channels, *args):
    """Output and gradient have the input's layout, and the values of the other one."""
    x = torch.randn(2, channels, 7, 6, device=backend.device)
    boxes = some_boxes(3, 2, 7, 6, device=backend.device)
    leaf = x.clone().requires_grad_()
    plain = backend(leaf, boxes, *args)
    assert plain.is_contiguous()
    last = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    y = backend(last, boxes, *args)
    if backend.name != "torch":
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(y, plain)
    for dy in (torch.randn(y.shape, device=x.device), torch.ones((), device=x.device).expand(y.shape)):
        (dx,) = torch.autograd.grad(y, last, dy, retain_graph=True)
        (expected,) = torch.autograd.grad(plain, leaf, dy, retain_graph=True)
        torch.testing.assert_close(dx, expected)
        if backend.name != "torch":
            assert dx.is_contiguous(memory_format=CHANNELS_LAST) and expected.is_contiguous()


def check_thread_counts(threads, x, call):
    """The same bits of output and gradient as with 3 threads."""
    before = torch.get_num_threads()
    x.requires_grad_()

    def run():
        y = call(x)
        return y.detach(), torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view(y.shape))[0]

    try:
        torch.set_num_threads(3)
        expected = run()
        torch.set_num_threads(threads)
        for a, b in zip(run(), expected, strict=True):
            assert_same_bits(a, b)
    finally:
        torch.set_num_threads(before)


def check_no_gradient_of_boxes(backend: Backend, channels):
    """The boxes' requires_grad is ignored; each bin passes on its whole gradient."""
    x = torch.randn(1, channels, 5, 5, device=backend.device)
    boxes = torch.tensor([[0, 1.0, 1, 4, 4]], device=backend.device, requires_grad=True)
    assert not backend(x, boxes, 2).requires_grad
    y = backend(x.requires_grad_(), boxes, 2)
    y.sum().backward()
    assert boxes.grad is None and x.grad.sum().item() == pytest.approx(y.numel())
