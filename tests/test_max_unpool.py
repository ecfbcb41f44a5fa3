"""max_unpool1d, 2d and 3d on every backend: values, gradients, layouts, duplicates, errors, torch's machinery."""

from __future__ import annotations

import itertools

import _opinfo
import pytest
import torch
import torch.nn.functional as F
from _backends import available, backends_for
from _checks import (
    assert_same_bits,
    check_cases,
    check_compile,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    check_opcheck,
    check_same_error,
)

from pydl import ops
from pydl.reference import spec as spec_of

OPS = ("max_unpool1d", "max_unpool2d", "max_unpool3d")
DIMS = {op: int(op[-2]) for op in OPS}
SIZES = {1: (37,), 2: (7, 19), 3: (5, 6, 9)}
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
TORCH = ("torch",)


def pairs(without=(), dtypes=True):
    """pytest parameters: (backend, dtype), or the backend, of all three ops."""
    return [
        pytest.param(*(b, dtype) if dtypes else (b,), id=f"{b.op}-{b}" + (f"-{dtype}"[6:] if dtypes else ""), marks=m)
        for op in OPS
        for b, m in ((p.values[0], p.marks) for p in backends_for(op, torch.float32, without=without))
        for dtype in (b.dtypes if dtypes else (None,))
        # torch's CPU kernels take no half precision here
        if not (b.name == "torch" and dtypes and dtype.itemsize == 2)
    ]


def last(x):
    """The same values with the channels innermost, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def pooled(dims, *shape, dtype=torch.float32, window=(2,)):
    """Maxima and their indices."""
    return getattr(F, f"max_pool{dims}d")(torch.randn(*shape, dtype=dtype), *window, return_indices=True)


@pytest.mark.parametrize("level", ["values", "gradients", "second"])
@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_cases(backend, dtype, level):
    check_cases(backend, dtype, level)


@pytest.mark.parametrize(("backend", "dtype"), pairs(TORCH))
def test_layouts(backend, dtype):
    (case,) = [case for case in spec_of(backend.op).cases() if case.layouts]
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_windows_and_output_sizes(backend, layout):
    dims, theirs = DIMS[backend.op], getattr(F, backend.op)
    for window in ((2,), (3,), (2, 3), (3, 3, 1)):
        x, indices = pooled(dims, 2, 5, *SIZES[dims], window=window)
        for size in (SIZES[dims], (2, 5, *SIZES[dims])):
            ours, other = (layout(x).to(backend.device).requires_grad_(), x.clone().requires_grad_())
            y = backend(ours, layout(indices).to(backend.device), *window, output_size=size)
            expected = theirs(other, indices, *window, output_size=size)
            assert_same_bits(y.detach().cpu(), expected.detach())
            if layout is last:
                assert y.movedim(1, -1).is_contiguous()
            dy = torch.randn_like(expected)
            (dx,) = torch.autograd.grad(y, ours, dy.to(y))
            assert torch.equal(dx.cpu(), torch.autograd.grad(expected, other, dy)[0])


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_the_last_of_equal_indices_stays(backend, layout):
    # 16 elements of each of 9 channels name one position; 400 threads of the GPU's kernels race for it
    dims = DIMS[backend.op]
    shape = (3, 9, *((1,) * (dims - 1)), 16)
    x = layout(torch.arange(3 * 9 * 16).reshape(shape).float()).to(backend.device).requires_grad_()
    indices = layout(torch.full(shape, 5)).to(backend.device)
    y = backend(x, indices, (*((1,) * (dims - 1)), 2))
    assert torch.equal(y.flatten(2)[..., 5], x.flatten(2)[..., -1]) and y.count_nonzero() == 27
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.eq(1).all()


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_gradcheck(backend):
    dims = DIMS[backend.op]
    x, indices = pooled(dims, 1, 2, *(8, 4, 4)[:dims], dtype=torch.float64)
    indices = indices.to(backend.device)
    check_gradcheck(lambda t: backend(t, indices, 2), [x.to(backend.device).requires_grad_()])


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_unbatched_and_empty(backend):
    dims = DIMS[backend.op]
    x, indices = pooled(dims, 3, *([8] * dims))
    y = backend(x.to(backend.device), indices.to(backend.device), 2)
    assert torch.equal(y.cpu(), getattr(F, backend.op)(x, indices, 2))
    empty = torch.zeros(0, 3, *([4] * dims), device=backend.device, requires_grad=True)
    y = backend(empty, empty.long(), 2)
    assert y.shape == (0, 3, *([8] * dims))
    assert torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", [-1, 16**3, 2**62, -(2**63)])
def test_an_index_outside_is_an_error_on_the_cpu(op, wrong):
    x, indices = pooled(DIMS[op], 1, 2, *([8] * DIMS[op]))
    indices[0, 1, ..., -1] = wrong
    check_same_error(getattr(ops, op), getattr(F, op), x, indices, 2, says=["indices"])


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_raw_operators_never_leave_the_planes(backend):
    # on a GPU what points outside is dropped; the backward gives zero there everywhere
    namespace, dims = NAMESPACES[backend.name], DIMS[backend.op]
    for layout, wrong in itertools.product((torch.Tensor.contiguous, last), (-1, 8**dims, 2**62, -(2**63))):
        x = layout(torch.ones(2, 9, *([4] * dims))).to(backend.device)
        indices = layout(torch.full((2, 9, *([4] * dims)), wrong)).to(backend.device)
        dy = layout(torch.ones(2, 9, *([8] * dims))).to(backend.device)
        with backend.use():
            assert not namespace.max_unpool_bwd(dy, indices).any()
            if backend.name == "cpu":
                with pytest.raises(RuntimeError, match="indices"):
                    namespace.max_unpool_fwd(x, indices, [8] * dims)
            else:
                assert not namespace.max_unpool_fwd(x, indices, [8] * dims).any()
            for bad in (indices.int(), indices[:1], indices[..., :3]):
                with pytest.raises(RuntimeError, match="indices"):
                    namespace.max_unpool_fwd(x, bad, [8] * dims)
            with pytest.raises(RuntimeError, match="size"):
                namespace.max_unpool_fwd(x, indices, [0] * dims)


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_samples_of_torchs_own_tests(backend):
    theirs, ran = getattr(F, backend.op), 0
    for x, args, kwargs in itertools.islice(_opinfo.samples(backend.op), 30):
        y, expected = backend(x, *args, **kwargs), theirs(x, *args, **kwargs)
        assert_same_bits(y.detach(), expected.detach())
        dy = torch.randn_like(expected)
        assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)))
        ran += 1
    assert ran > 3


def errors():
    x, indices = pooled(2, 1, 2, 8, 8)
    yield dict(input=x, indices=indices.int()), ["indices", "int32"]
    yield dict(input=x, indices=indices[..., :3]), ["indices", "[1, 2, 4, 3]"]
    yield dict(input=x[0, 0], indices=indices[0, 0]), ["input", "[4, 4]"]
    yield dict(input=x[:, :0], indices=indices[:, :0]), ["input"]
    yield dict(input=x, indices=indices, output_size=(8,)), ["output_size"]
    yield dict(input=x, indices=indices, output_size=(10, 8)), ["output_size", "(10, 8)"]
    yield dict(input=x, indices=indices, output_size=(8, 6)), ["output_size", "(8, 6)"]


@pytest.mark.parametrize(("arguments", "says"), list(errors()))
def test_errors_are_torchs(arguments, says):
    check_same_error(ops.max_unpool2d, F.max_unpool2d, kernel_size=2, says=["max_unpool2d", *says], **arguments)


@pytest.mark.parametrize("backend", [b for b in available("max_unpool2d") if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        for dims, layout in ((1, torch.Tensor.contiguous), (2, last), (3, last)):
            x, indices = (layout(t) for t in pooled(dims, 2, 3, *([8] * dims)))
            check_opcheck(namespace.max_unpool_fwd.default, x.requires_grad_(), indices, [8] * dims)
            dy = layout(torch.randn(2, 3, *([8] * dims))).requires_grad_()
            check_opcheck(namespace.max_unpool_bwd.default, dy, indices)


@pytest.mark.compile
@pytest.mark.parametrize("op", OPS)
def test_compile(op):
    dims = DIMS[op]
    tensors = [pooled(dims, *s[: dims + 2]) for s in ((2, 3, 8, 8, 4), (1, 3, 12, 6, 6))]
    indices = {x.shape: i for x, i in tensors}
    check_compile(lambda x: getattr(ops, op)(x, indices[x.shape], 2) * 2, [[x] for x, _ in tensors])


@pytest.mark.parametrize("backend", pairs(TORCH, dtypes=False))
def test_deterministic(backend):
    dims = DIMS[backend.op]
    x, indices = pooled(dims, 2, 5, *(9, 8, 6)[:dims], window=(3, 1))
    indices = indices.to(backend.device)
    check_deterministic(lambda t: backend(t, indices, 3, 1), x.to(backend.device))
