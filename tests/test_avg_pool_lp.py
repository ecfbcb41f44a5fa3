"""lp_pool1d, 2d and 3d: torch's values, a gradient that is zero where torch's is, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _backends import backends_for
from _checks import check_cases, check_compile, check_deterministic, check_gradcheck, check_layouts, check_same_error

from pydl import ops
from pydl.reference import spec as spec_of

OPS = ("lp_pool1d", "lp_pool2d", "lp_pool3d")
DIMS = {op: int(op[-2]) for op in OPS}
TORCH = ("torch",)


def pairs(without=(), dtypes=True):
    """pytest parameters: (backend, dtype), or the backend, of all three ops."""
    return [
        pytest.param(*(b, dtype) if dtypes else (b,), id=f"{b.op}-{b}" + (f"-{dtype}"[6:] if dtypes else ""), marks=m)
        for op in OPS
        for b, m in ((p.values[0], p.marks) for p in backends_for(op, torch.float32, without=without))
        for dtype in (b.dtypes if dtypes else (None,))
        # torch's CPU kernel of a volume's means takes no half precision
        if not (b.name == "torch" and op == "lp_pool3d" and dtypes and dtype.itemsize == 2)
    ]


@pytest.mark.parametrize("level", ["values", "gradients", "second"])
@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_cases(backend, dtype, level):
    check_cases(backend, dtype, level)


@pytest.mark.parametrize(("backend", "dtype"), pairs(TORCH))
def test_layouts(backend, dtype):
    (case,) = [case for case in spec_of(backend.op).cases() if case.layouts]
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_against_torch(backend):
    dims, theirs = DIMS[backend.op], getattr(F, backend.op)
    x = torch.randn(2, 3, *(9, 7, 8)[:dims], dtype=torch.float64, device=backend.device)
    for window in ((2, 2), (2.0, 3, 2), (4, 2, None, True), (float("inf"), 2), (-float("inf"), 3, 1), (3, 2)):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = backend(leaf, *window), theirs(other, *window)
        torch.testing.assert_close(y, expected, equal_nan=True)  # the third root of a negative sum is NaN
        if window[0] != 3:
            torch.testing.assert_close(
                *(torch.autograd.grad(*a)[0] for a in ((y.sum(), leaf), (expected.sum(), other)))
            )


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_the_gradient_of_a_window_of_zeros_is_zero(backend):
    x = torch.zeros(1, 1, *([4] * DIMS[backend.op]), device=backend.device)
    x[..., 2:] = 3
    leaf = x.requires_grad_()
    y = backend(leaf, 2, 2)
    (dx,) = torch.autograd.grad(y.sum(), leaf, create_graph=backend.name != "torch")
    assert dx.isfinite().all() and dx[..., :2].eq(0).all() and dx[..., 2:].gt(0).all()
    if backend.name != "torch":  # torch's second derivative is NaN there
        assert torch.autograd.grad(dx.square().sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_gradcheck(backend):
    x = torch.rand(1, 2, *(5, 4, 4)[: DIMS[backend.op]], dtype=torch.float64, device=backend.device) + 0.5
    check_gradcheck(lambda t: backend(t, 3, 2), [x.requires_grad_()])


@pytest.mark.parametrize("op", OPS)
def test_errors_are_torchs(op):
    x = torch.zeros(1, 1, *([8] * DIMS[op]))
    for arguments in ((2, 0), (2, 9), (2, 2, 0), (2, 2, -1)):
        check_same_error(getattr(ops, op), getattr(F, op), x, *arguments)
    with pytest.raises(TypeError, match=f"{op}.*input"):
        getattr(ops, op)([1.0], 2, 2)


@pytest.mark.compile
@pytest.mark.parametrize("op", OPS)
def test_compile(op):
    shapes = [[torch.rand(*s[: DIMS[op] + 2])] for s in ((2, 3, 8, 8, 4), (1, 3, 11, 6, 5))]
    check_compile(lambda x: getattr(ops, op)(x, 2, 3, 2), shapes)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_deterministic(backend):
    x = torch.randn(2, 5, *(8, 9, 6)[: DIMS[backend.op]], device=backend.device)
    check_deterministic(lambda t: backend(t, 2, 3, 1), x)
