"""rms_norm on every backend: values, gradients, second derivatives, layouts, errors and torch's own machinery."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    ops_called,
)

import pydl
from pydl import ops
from pydl._grading import grade
from pydl.reference.rms_norm import cases, rms_norm, rms_norm_grad

OP = "rms_norm"
CASES = {case.name: case for case in cases()}
TORCH = ("torch",)
# each costs the interpreter 0.3 s and more; one dtype runs them
HEAVY = ("rows 300", "long row")
NATIVE = [b for b in available(OP) if b.name != "torch"]
NAMESPACES = {"cpu": torch.ops.pydl, "triton": torch.ops.pydl_triton}


def keep(backend, dtype):
    return lambda case: not (backend.slow and dtype != torch.float32 and case.name in HEAVY)


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values", keep(backend, dtype))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients", keep(backend, dtype))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize("backend", backends_for(OP, torch.bfloat16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_with_a_float32_weight(backend, low):
    # 5 x 33: an odd row, longer than a vector
    x = torch.randn(5, 33, device=backend.device).to(low).requires_grad_()
    weight = torch.randn(33, device=backend.device, requires_grad=True)
    dy = torch.randn(5, 33, device=backend.device).to(low)
    y = backend(x, (33,), weight, 1e-3)
    assert y.dtype == low
    exact = [t.detach().double().cpu().numpy() for t in (x, weight)]
    assert grade(y, rms_norm(exact[0], (33,), exact[1], 1e-3), dtype=low).ok
    oracle = rms_norm_grad(dy.double().cpu().numpy(), exact[0], (33,), exact[1], 1e-3)
    for got, wanted, tensor in zip(torch.autograd.grad(y, (x, weight), dy), oracle, (x, weight), strict=True):
        assert got.dtype == tensor.dtype
        result = grade(got, wanted, dtype=tensor.dtype, gradient=True, reduction=5)
        assert result.ok, result


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("rows", [1, 7, 64, 129])  # one, odd, a block of rows, two blocks and one
def test_weight_gradients_add_up_over_rows(backend, rows):
    x, dy = (torch.randn(rows, 5, device=backend.device) for _ in range(2))
    weight = torch.ones(5, device=backend.device, requires_grad=True)
    (got,) = torch.autograd.grad(backend(x, (5,), weight, 1e-5), weight, dy)
    arrays = [t.detach().double().cpu().numpy() for t in (dy, x, weight)]
    wanted = rms_norm_grad(arrays[0], arrays[1], (5,), arrays[2], 1e-5)[1]
    assert grade(got, wanted, gradient=True, reduction=rows).ok


def test_squares_beyond_float32():
    # torch's own gives zeros: 1e25 squared is infinite in float32
    x = torch.tensor([[1e25, -2e25, 3e25], [1.0, float("inf"), 2.0]])
    y = ops.rms_norm(x, (3,), None, 1e-5)
    assert grade(y[:1], rms_norm(x[:1].double().numpy(), (3,), None, 1e-5)).ok
    assert y[1, 0] == 0 and y[1, 1].isnan() and y[1, 2] == 0


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_default_eps_is_that_of_the_sums(backend, dtype):
    # mean square 1e-8: below float32's epsilon, far above float64's
    x = torch.full((2, 4), 1e-4, dtype=dtype, device=backend.device)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(backend(x, (4,)), F.rms_norm(x, (4,)))
    torch.testing.assert_close(backend(x, (4,)), backend(x, (4,), None, eps))
    assert (backend(x, (4,))[0, 0] > 0.9) == (dtype == torch.float64)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_wanted_gradients(backend, frozen):
    tensors = {"x": torch.randn(3, 8), "weight": torch.randn(8)}
    tensors = {k: v.to(backend.device).requires_grad_(k != frozen) for k, v in tensors.items()}
    wanted = [v for k, v in tensors.items() if k != frozen]
    results = [
        torch.autograd.grad(op(tensors["x"], (8,), tensors["weight"]).sum(), wanted) for op in (backend, F.rms_norm)
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(backend, weighted):
    # 3 rows of 2 x 3: several normalised axes, and small because gradgradcheck is quadratic in the size
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    given = [x, weight] if weighted else [x]
    check_gradcheck(lambda x, w=None: backend(x, (2, 3), w, 1e-3), given)


def test_third_derivative_equals_torchs():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def third(op):
        (g,) = torch.autograd.grad(op(x, (4,)).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), x)[0]

    with pydl.backend("cpu"):
        torch.testing.assert_close(third(ops.rms_norm), third(F.rms_norm))


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["row of 64"])
    if not backend.slow:
        check_layouts(backend, dtype, CASES["two axes"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_gradient_of_any_layout(backend):
    # y.sum().backward() gives a gradient with stride 0; a following transpose gives one with swapped strides
    x = torch.randn(6, 10, device=backend.device, requires_grad=True)
    weight = torch.randn(10, device=backend.device, requires_grad=True)
    for dy in (torch.ones((), device=backend.device).expand(6, 10), torch.randn(10, 6, device=backend.device).t()):
        got = torch.autograd.grad(backend(x, (10,), weight), (x, weight), dy)
        expected = torch.autograd.grad(F.rms_norm(x, (10,), weight), (x, weight), dy)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize(
    ("shape", "last"), [((0, 4), (4,)), ((3, 0), (0,)), ((0,), (0,)), ((2, 0, 4), (4,)), ((2, 3, 0), (3, 0))]
)
def test_nothing_to_do(backend, shape, last):
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    weight = torch.ones(last, device=backend.device, requires_grad=True)
    y = backend(x, last, weight)
    assert y.shape == torch.Size(shape)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert dx.shape == x.shape
    # no row contributes: the sum is zero, not what the memory held
    assert torch.equal(dweight, torch.zeros_like(weight))


# errors


def bad(**changes):
    return {"input": torch.zeros(2, 3), "normalized_shape": (3,), "weight": torch.ones(3), **changes}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (bad(normalized_shape=(4,), weight=None), [OP, "input", "[*, 4]", "[2, 3]"]),
        (bad(normalized_shape=(), weight=None), [OP, "normalized_shape", "at least one"]),
        (bad(normalized_shape=(2, 2, 3), weight=None), [OP, "input", "[2, 3]"]),
        (bad(weight=torch.ones(2)), [OP, "weight", "[3]", "[2]"]),
        (bad(input=[1.0, 2.0, 3.0]), [OP, "input", "list"]),
        (bad(weight=3.0), [OP, "weight", "float"]),
        (bad(input=torch.zeros(2, 3, dtype=torch.int64)), [OP, "int64"]),
        (bad(normalized_shape="3"), [OP, "normalized_shape", "str"]),
        (bad(normalized_shape=3), [OP, "normalized_shape", "int"]),
        (bad(normalized_shape=("3",)), [OP, "normalized_shape", "'3'"]),
        (bad(normalized_shape=None), [OP, "normalized_shape", "None"]),
        (bad(eps="a"), [OP, "eps", "'a'"]),
        (bad(weight=torch.ones(3, device="meta")), [OP, "weight", "cpu", "meta"]),
    ],
    ids=["shape", "empty shape", "rank", "weight", "list", "number", "integers", "string", "int", "tuple of strings"]
    + ["None", "eps", "device"],
)
def test_errors_are_torchs(arguments, says):
    check_same_error(ops.rms_norm, F.rms_norm, says=says, **arguments)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_arguments_as_torch_takes_them():
    x = torch.randn(3, 8)
    for shape in ((8,), [8], torch.Size([8]), (np.int64(8),), (torch.tensor(8),)):
        for eps in (1e-3, np.float32(1e-3), torch.tensor(1e-3)):
            torch.testing.assert_close(ops.rms_norm(x, shape, eps=eps), F.rms_norm(x, (8,), eps=1e-3))
    for weight in (torch.ones(8, dtype=torch.float16), torch.ones(8, dtype=torch.int64), torch.ones(8).double()):
        torch.testing.assert_close(ops.rms_norm(x, (8,), weight), F.rms_norm(x, (8,), weight))
    z = x.to(torch.complex64)
    torch.testing.assert_close(ops.rms_norm(z, (8,)), F.rms_norm(z, (8,)))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    # reached without the public checks: an exception, never a read outside the tensors
    namespace = NAMESPACES[backend.name]
    x, rstd = torch.zeros(4, 6, device=backend.device), torch.ones(4, device=backend.device)
    short = torch.ones(5, device=backend.device)
    both = [True, True]
    with backend.use():
        for call in (
            lambda: namespace.rms_norm_fwd(x, [5], None, 1e-5),
            lambda: namespace.rms_norm_fwd(x, [6], short, 1e-5),
            lambda: namespace.rms_norm_bwd(x, x, [6], short, None, both),
            lambda: namespace.rms_norm_bwd(x[:2], x, [6], rstd, None, both),
            lambda: namespace.rms_norm_bwd(x, x, [6], rstd, short, both),
        ):
            with pytest.raises(Exception, match=r"."):
                call()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in NATIVE if b.device == "cpu"], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        check_opcheck(namespace.rms_norm_fwd.default, x, [4], weight, 1e-5)
        check_opcheck(namespace.rms_norm_fwd.default, x, [4], None, 1e-5)
        dy = torch.randn(3, 4)
        _, rstd = namespace.rms_norm_fwd(x.detach(), [4], weight.detach(), 1e-5)
        for mask in ([True, True], [True, False], [False, True]):
            check_opcheck(namespace.rms_norm_bwd.default, dy, x.detach(), [4], rstd, weight.detach(), mask)


@pytest.mark.compile
def test_compile():
    def fn(x, weight):
        return ops.rms_norm(x, (x.shape[-1],), weight) * 2

    check_compile(fn, [(torch.randn(4, 6), torch.randn(6)), (torch.randn(7, 9), torch.randn(9))])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    x, weight = torch.randn(3, 8, device=backend.device), torch.randn(8, device=backend.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype")
        for given in (x, x.bfloat16()):
            check_autocast(backend, F.rms_norm, given, (8,), weight, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_deterministic(backend):
    # 70 rows: more than one block of the two-stage sum for the weight
    shape = (70, 24) if backend.slow else (1003, 257)
    x, weight = torch.randn(shape, device=backend.device), torch.randn(shape[1:], device=backend.device)
    check_deterministic(lambda x, w: backend(x, shape[1:], w), x, weight)


@pytest.mark.parametrize("threads", [2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    x, weight = torch.randn(937, 50, requires_grad=True), torch.randn(50, requires_grad=True)
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(torch.autograd.grad(ops.rms_norm(x, (50,), weight).pow(2).sum(), (x, weight)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_nothing_is_kept_for_a_backward_nobody_wants():
    with ops_called() as called:
        y = ops.rms_norm(torch.randn(2, 4), (4,), torch.randn(4))
    assert not y.requires_grad and "pydl::rms_norm_bwd" not in called.names


def test_the_module_is_a_drop_in():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.RMSNorm(8))
    x = torch.randn(3, 6)
    expected = model(x)
    assert any(row.replaced and row.kind == "RMSNorm" for row in pydl.accelerate(model))
    with pydl.trace() as trace:
        torch.testing.assert_close(model(x), expected)
    assert [record.backend for record in trace if record.op == OP] == ["cpu"]
