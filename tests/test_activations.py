"""Activations on every backend: values, gradients, special values, layouts, in-place forms, torch's machinery."""

from __future__ import annotations

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
)

import pydl
from pydl import ops
from pydl._grading import grade
from pydl.reference import specs

FUNCTIONS = list(specs("activations"))
FORMS = [
    ("relu", {}),
    ("leaky_relu", {"negative_slope": 0.2}),
    ("sigmoid", {}),
    ("tanh", {}),
    ("gelu", {}),
    ("gelu", {"approximate": "tanh"}),
    ("silu", {}),
]
INPLACE = ("relu", "leaky_relu", "silu")
FORM_IDS = ["-".join([name, *map(str, kwargs.values())]) for name, kwargs in FORMS]
TRITON = [b for name in FUNCTIONS for b in available(name) if b.name == "triton"]
INF, NAN = float("inf"), float("nan")


def pairs(*, dtypes=True, without=()):
    """(backend, dtype) or backend of every activation; the backend knows its op."""
    return [
        pytest.param(*p.values, id=f"{name}-{p.id}", marks=p.marks)
        for name in FUNCTIONS
        for p in (backends_and_dtypes(name, without) if dtypes else backends_for(name, without=without))
    ]


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_values_and_gradients(backend, dtype):
    check_cases(backend, dtype, "values")
    check_cases(backend, dtype, "gradients")


@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize(("name", "kwargs"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_special_values(name, kwargs, dtype):
    # zeros of both signs, the smallest and largest numbers, where exp overflows (89), and beyond. Against the oracle:
    # torch's gelu gives inf at the largest number, its tanh form a NaN gradient, its silu 0 at -89
    info = torch.finfo(dtype)
    points = [0.0, -0.0, info.tiny, -info.tiny, info.max, -info.max, 89.0, -89.0, 20.0, -20.0, INF, -INF, NAN]
    (spec,) = specs(name).values()
    for backend in available(name):
        if dtype not in backend.dtypes or backend.name == "torch":
            continue
        x = torch.tensor(points, dtype=dtype, device=backend.device, requires_grad=True)
        y = backend(x, **kwargs)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        array = x.detach().double().cpu().numpy()
        finite = slice(0, -3)
        slopes = spec.gradient(np.ones(len(points)), array, **kwargs)[0]
        # values relative down to the smallest normal number; slopes come from the rounded output for some functions
        for got, oracle, atol in ((y, spec.forward(array, **kwargs), 8 * info.tiny), (dx, slopes, 4 * info.eps)):
            wanted = torch.from_numpy(oracle).to(x.device)
            torch.testing.assert_close(got.double()[finite], wanted[finite], rtol=4 * info.eps, atol=atol)
        # at infinity the limit of the function, or torch's value where that is the accident 0 * inf
        expected = getattr(F, name)(x, **kwargs)[-3:].tolist()
        for ours, theirs, limit in zip(
            y[-3:].tolist(), expected, spec.forward(array, **kwargs)[-3:].tolist(), strict=True
        ):
            assert repr(ours) in (repr(theirs), repr(limit)), (ours, theirs, limit)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_float32_extremes_do_not_overflow_inside(backend):
    # the argument of an exponential on the way must not overflow: dense around +-88 and +-104, where it would
    if backend.op == "heaviside_step":
        pytest.skip("no exponential in a step")
    x = torch.cat([torch.linspace(a, b, 64) for a, b in ((-110, -80), (80, 110), (-11, -4), (4, 11))]).to(
        backend.device
    )
    (spec,) = specs(backend.op).values()
    assert grade(backend(x), spec.forward(x.double().cpu().numpy()), getattr(F, backend.op)(x)).ok


# the step, which torch does not have


@pytest.mark.parametrize("backend", backends_for("heaviside_step"))
def test_step_has_zero_gradient_everywhere(backend):
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, NAN, INF, -INF], device=backend.device, requires_grad=True)
    y = backend(x)
    assert y.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert backend(x, 1.0).tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    assert dx is not None and dx.tolist() == [0.0] * 7  # zero, not missing: a module in front still gets a gradient


def test_step_documents_its_gradient():
    assert "gradient is zero" in ops.heaviside_step.__doc__


# gradcheck


@pytest.mark.parametrize(("name", "kwargs"), FORMS, ids=FORM_IDS)
def test_gradcheck(name, kwargs):
    # away from 0, where relu and leaky_relu have no derivative
    x = torch.tensor([-2.5, -0.8, -0.3, 0.4, 1.1, 3.0], dtype=torch.float64, requires_grad=True)
    check_gradcheck(lambda t: getattr(ops, name)(t, **kwargs), [x])


@pytest.mark.parametrize("backend", [b for b in TRITON if b.device == "cpu"], ids=lambda b: b.op)
def test_gradient_penalty_equals_torch(backend):
    x = torch.randn(3, 5, requires_grad=True)

    def penalty(f):
        (slope,) = torch.autograd.grad(f(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad((slope.norm() - 1) ** 2, x, allow_unused=True)[0]

    with pydl.backend("torch"):
        expected = penalty(getattr(ops, backend.op))
    torch.testing.assert_close(penalty(backend), expected, rtol=1e-4, atol=1e-5)


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), pairs(without=("torch",)))
def test_layouts(backend, dtype):
    if backend.slow and dtype != torch.float32:
        pytest.skip("the interpreter does addresses alike in every dtype")
    for case in (c for c in specs(backend.op)[backend.op].cases() if c.layouts):
        check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_dense_layouts_are_kept(backend):
    x = torch.randn(2, 3, 4, 5, device=backend.device)
    for view in (x, x.contiguous(memory_format=torch.channels_last), x.permute(3, 1, 0, 2)):
        leaf = view.detach().requires_grad_()
        y = backend(leaf)
        assert y.stride() == view.stride()
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert dx.stride() == view.stride()
        assert y.data_ptr() != view.data_ptr()


@pytest.mark.parametrize("backend", backends_for("silu", torch.float32))
@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 1023, 1025, 2049])  # none, one, and one beside a tile's end
def test_edge_sizes(backend, n):
    x = torch.randn(n, device=backend.device)
    torch.testing.assert_close(backend(x), F.silu(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", pairs(dtypes=False))
def test_scalar_tensor(backend):
    x = torch.tensor(0.75, device=backend.device, requires_grad=True)
    y = backend(x)
    assert y.shape == ()
    assert torch.autograd.grad(y, x)[0].shape == ()


@pytest.mark.parametrize("backend", backends_for("gelu", torch.float32))
def test_gradient_of_any_layout(backend):
    x = torch.randn(6, 10, device=backend.device, requires_grad=True)
    for dy in (torch.ones((), device=backend.device).expand(6, 10), torch.randn(10, 6, device=backend.device).t()):
        torch.testing.assert_close(
            torch.autograd.grad(backend(x), x, dy)[0], torch.autograd.grad(F.gelu(x), x, dy)[0], rtol=1e-5, atol=1e-6
        )


# in-place forms


@pytest.mark.parametrize("name", INPLACE)
def test_inplace_is_torchs_own(name):
    x = torch.randn(5)
    expected = getattr(F, name)(x.clone())
    with pydl.trace() as trace:
        y = getattr(pydl.functional, name)(x, inplace=True)
    assert y.data_ptr() == x.data_ptr()
    assert_same_bits(x, expected)
    assert [r.backend for r in trace] == ["torch"] and "in-place" in trace[0].reason


@pytest.mark.parametrize("name", INPLACE)
def test_inplace_on_a_leaf_is_refused_as_by_torch(name):
    check_same_error(
        getattr(ops, name),
        getattr(F, name),
        torch.zeros(3, requires_grad=True),
        inplace=True,
        says=["leaf", "in-place"],
    )


def test_cpu_tensors_go_to_torch_and_the_trace_says_why():
    with pydl.trace() as trace:
        ops.relu(torch.randn(3))
    assert [r.backend for r in trace] == ["torch"] and "memory floor" in trace[0].reason


# errors


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_tensors(name):
    with pytest.raises(TypeError, match=rf"{name}.*'input'.*list"):
        getattr(ops, name)([1.0])


@pytest.mark.parametrize(("name", "kwargs"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_do_what_torch_does(name, kwargs, dtype):
    x = torch.ones(3).to(dtype)
    try:
        expected = getattr(F, name)(x, **kwargs)
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(ops, name)(x, **kwargs)
    else:
        assert_same_bits(getattr(ops, name)(x, **kwargs), expected)


def test_gelu_knows_two_forms():
    check_same_error(ops.gelu, F.gelu, torch.zeros(2), approximate="fast", says=["gelu", "approximate", "'fast'"])


def test_step_takes_floating_point_only():
    with pytest.raises(NotImplementedError, match=r"heaviside_step.*int64"):
        ops.heaviside_step(torch.zeros(2, dtype=torch.int64))


def test_a_forced_backend_that_cannot_run_says_why():
    with pydl.backend("cuda"), pytest.raises(RuntimeError, match=r"relu.*cuda"):
        ops.relu(torch.zeros(2))


# torch's machinery


KINDS = ("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "step")


@pytest.mark.skipif(
    not any(b.device == "cpu" for b in TRITON), reason="triton is interpreted on machines without a GPU"
)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    x = torch.randn(2, 3, 4).transpose(0, 1)
    saved = torch.ops.pydl_triton.activation_fwd(x, kind, 0.2)
    check_opcheck(torch.ops.pydl_triton.activation_fwd.default, x.clone().requires_grad_(), kind, 0.2)
    check_opcheck(torch.ops.pydl_triton.activation_bwd.default, torch.randn_like(x), saved, kind, 0.2)


@pytest.mark.compile
@pytest.mark.parametrize(("name", "kwargs"), FORMS, ids=FORM_IDS)
def test_compile(name, kwargs):
    def fn(x):
        return getattr(ops, name)(x, **kwargs) * 2

    check_compile(fn, [[torch.randn(4, 6)], [torch.randn(3, 5)]])


@pytest.mark.parametrize("backend", pairs(dtypes=False, without=("torch",)))
def test_autocast(backend):
    if backend.op == "heaviside_step":
        pytest.skip("torch has no such op to agree with")
    for x in (torch.randn(8, device=backend.device), torch.randn(8, device=backend.device).bfloat16()):
        check_autocast(backend, getattr(F, backend.op), x, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", pairs(dtypes=False, without=("torch",)))
def test_deterministic(backend):
    check_deterministic(backend, torch.randn(300, device=backend.device))
