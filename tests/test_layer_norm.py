"""layer_norm on every backend: values, gradients, second derivatives, layouts, errors and torch's own machinery."""

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
    ops_called,
)

import pydl
from pydl import ops
from pydl._grading import grade
from pydl.reference.layer_norm import cases, layer_norm, layer_norm_grad, layer_norm_stats

OP = "layer_norm"
CASES = {case.name: case for case in cases()}
# each costs the interpreter 0.3 s and more; one dtype runs them
HEAVY = ("rows 300", "long row")
NATIVE = [b for b in available(OP) if b.name != "torch"]


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


@pytest.mark.parametrize("backend", backends_for(OP, torch.bfloat16, without=("torch",)))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_with_float32_parameters(backend, low):
    # what autocast and mixed-precision models give; 5 x 33: an odd row, longer than a vector
    x = torch.randn(5, 33, device=backend.device).to(low).requires_grad_()
    weight = torch.randn(33, device=backend.device, requires_grad=True)
    bias = torch.randn(33, device=backend.device, requires_grad=True)
    dy = torch.randn(5, 33, device=backend.device).to(low)
    y = backend(x, (33,), weight, bias)
    assert y.dtype == low
    exact = [t.detach().double().cpu().numpy() for t in (x, weight, bias)]
    assert grade(y, layer_norm(exact[0], (33,), *exact[1:]), dtype=low).ok
    oracle = layer_norm_grad(dy.double().cpu().numpy(), exact[0], (33,), *exact[1:])
    for got, wanted, tensor in zip(
        torch.autograd.grad(y, (x, weight, bias), dy), oracle, (x, weight, bias), strict=True
    ):
        assert got.dtype == tensor.dtype
        result = grade(got, wanted, dtype=tensor.dtype, gradient=True, reduction=5)
        assert result.ok, result


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
@pytest.mark.parametrize("rows", [1, 7, 64, 129])  # one, odd, a block of rows, two blocks and one
def test_weight_gradients_add_up_over_rows(backend, rows):
    x = torch.randn(rows, 5, device=backend.device)
    weight, bias = (torch.ones(5, device=backend.device, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)
    got = torch.autograd.grad(backend(x, (5,), weight, bias), (weight, bias), dy)
    oracle = layer_norm_grad(dy.double().cpu().numpy(), x.double().cpu().numpy(), (5,))[1:]
    for g, wanted in zip(got, oracle, strict=True):
        assert grade(g, wanted, gradient=True, reduction=rows).ok


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
def test_large_mean_keeps_its_digits(backend):
    # mean 1e4, deviation 1: E[x^2] - E[x]^2 in float32 would have no correct digit left
    x = (1e4 + torch.randn(4, 1000)).to(backend.device)
    y = backend(x, (1000,))
    mean, rstd = layer_norm_stats(x.double().cpu().numpy(), (1000,))
    exact = (x.double().cpu().numpy() - mean) * rstd
    assert grade(y, exact).err < 2e-3  # one unit in the last place of the mean, 1e-3, over a deviation of 1


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_the_wanted_gradients(backend, frozen):
    tensors = {"x": torch.randn(3, 8), "weight": torch.randn(8), "bias": torch.randn(8)}
    tensors = {k: v.to(backend.device).requires_grad_(k != frozen) for k, v in tensors.items()}
    y = backend(tensors["x"], (8,), tensors["weight"], tensors["bias"])
    expected = F.layer_norm(tensors["x"], (8,), tensors["weight"], tensors["bias"])
    wanted = [v for k, v in tensors.items() if k != frozen]
    for a, b in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
def test_gradcheck(backend, parameters):
    if backend.name == "torch" and parameters == "bias":
        pytest.skip("torch 2.13's second derivative without weight forgets the bias")
    # 3 rows of 2 x 3: several normalised axes, and small because gradgradcheck is quadratic in the size
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True) if parameters in ("both", "weight") else None
    bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True) if parameters in ("both", "bias") else None
    given = [t for t in (x, weight, bias) if t is not None]

    def fn(*tensors):
        rest = iter(tensors[1:])
        w = next(rest) if weight is not None else None
        b = next(rest) if bias is not None else None
        return backend(tensors[0], (2, 3), w, b, 1e-3)

    check_gradcheck(fn, given)


def test_third_derivative_equals_the_formulas():
    # against the formula in elementary ops: torch 2.13's own third derivative takes mean and rstd for constants
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def formula(x, shape):
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5)

    def third(op):
        (g,) = torch.autograd.grad(op(x, (4,)).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), x)[0]

    with pydl.backend("cpu"):
        torch.testing.assert_close(third(ops.layer_norm), third(formula))


def test_gradient_penalty_of_an_accelerated_critic():
    """WGAN-GP (Gulrajani and others, 2017): the penalty's gradient needs second derivatives through every layer."""
    torch.manual_seed(5)

    def critic():
        torch.manual_seed(9)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 3),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Flatten(),
            torch.nn.LayerNorm(3 * 6 * 6),
            torch.nn.Linear(3 * 6 * 6, 1),
        ).double()

    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)

    def gradients(model):
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        (penalty - model(images).mean()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, accelerated = critic(), critic()
    report = pydl.accelerate(accelerated)
    assert "LayerNorm" in str(report) and report.replaced
    with pydl.trace() as trace:
        ours = gradients(accelerated)
    assert any(r.op == "layer_norm" and r.phase == "backward" for r in trace)
    for name, expected in gradients(plain).items():
        assert ours[name] is not None, name
        torch.testing.assert_close(ours[name], expected, msg=lambda m, name=name: f"{name}: {m}")


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=("torch",)))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["row of 64"])
    if not backend.slow:
        check_layouts(backend, dtype, CASES["two axes"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
def test_gradient_of_any_layout(backend):
    # y.sum().backward() gives a gradient with stride 0; a following transpose gives one with swapped strides
    x = torch.randn(6, 10, device=backend.device, requires_grad=True)
    weight = torch.randn(10, device=backend.device, requires_grad=True)
    for dy in (torch.ones((), device=backend.device).expand(6, 10), torch.randn(10, 6, device=backend.device).t()):
        got = torch.autograd.grad(backend(x, (10,), weight), (x, weight), dy)
        expected = torch.autograd.grad(F.layer_norm(x, (10,), weight), (x, weight), dy)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize(
    ("shape", "last"), [((0, 4), (4,)), ((3, 0), (0,)), ((0,), (0,)), ((2, 0, 4), (4,)), ((2, 3, 0), (3, 0))]
)
def test_nothing_to_do(backend, shape, last):
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    weight, bias = (torch.ones(last, device=backend.device, requires_grad=True) for _ in range(2))
    y = backend(x, last, weight, bias)
    assert y.shape == torch.Size(shape)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert dx.shape == x.shape
    # no row contributes: the sums are zero, not what the memory held
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
def test_output_is_contiguous_and_never_the_input(backend):
    x = torch.randn(5, 4, 6, device=backend.device).transpose(0, 1)
    y = backend(x, (6,))
    assert y.is_contiguous() and y.data_ptr() != x.data_ptr()


# errors


def bad(**changes):
    arguments = {"input": torch.zeros(2, 3), "normalized_shape": (3,), "weight": torch.ones(3), "bias": torch.zeros(3)}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (bad(normalized_shape=(4,)), ["layer_norm", "input", "[*, 4]", "[2, 3]"]),
        (bad(normalized_shape=()), ["layer_norm", "normalized_shape", "at least one"]),
        (bad(normalized_shape=(2, 2, 3)), ["layer_norm", "input", "[2, 3]"]),
        (bad(weight=torch.ones(2)), ["layer_norm", "weight", "[3]", "[2]"]),
        (bad(bias=torch.ones(1, 3)), ["layer_norm", "bias", "[3]", "[1, 3]"]),
        (bad(input=[1.0, 2.0, 3.0]), ["layer_norm", "input", "list"]),
        (bad(weight=3.0), ["layer_norm", "weight", "float"]),
        (bad(input=torch.zeros(2, 3, dtype=torch.int64)), ["layer_norm", "int64"]),
        (bad(normalized_shape="3"), ["layer_norm", "normalized_shape", "str"]),
        (bad(weight=torch.ones(3, dtype=torch.float16)), ["layer_norm", "weight", "float16"]),
        (bad(normalized_shape=3), ["layer_norm", "normalized_shape", "int"]),
        (bad(normalized_shape=("3",)), ["layer_norm", "normalized_shape", "'3'"]),
        (bad(normalized_shape=None), ["layer_norm", "normalized_shape", "None"]),
    ],
    ids=["shape", "empty shape", "rank", "weight", "bias", "list", "number", "integers", "string", "weight dtype"]
    + ["int", "tuple of strings", "None"],
)
def test_errors_are_torchs(arguments, says):
    check_same_error(ops.layer_norm, F.layer_norm, says=says, **arguments)


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match=r"layer_norm.*weight.*cpu.*meta"):
        ops.layer_norm(torch.zeros(2, 3), (3,), torch.ones(3, device="meta"))


def test_a_forced_backend_that_cannot_run_says_why():
    with pydl.backend("cuda"), pytest.raises(RuntimeError, match=r"layer_norm.*cuda"):
        ops.layer_norm(torch.zeros(2, 3), (3,))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    # reached without the public checks: an exception, never a read outside the tensors
    with backend.use():
        namespace = {"cpu": torch.ops.pydl, "triton": torch.ops.pydl_triton}[backend.name]
        x = torch.zeros(4, 6, device=backend.device)
        short = torch.ones(5, device=backend.device)
        for wrong in ((x, [5], None, None, 1e-5), (x, [6], short, None, 1e-5), (x, [6], None, short, 1e-5)):
            with pytest.raises(Exception, match=r"."):
                namespace.layer_norm_fwd(*wrong)


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in NATIVE if b.device == "cpu"], ids=str)
def test_opcheck(backend):
    namespace = {"cpu": torch.ops.pydl, "triton": torch.ops.pydl_triton}[backend.name]
    with backend.use():
        x = torch.randn(3, 4, requires_grad=True)
        weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
        check_opcheck(namespace.layer_norm_fwd.default, x, [4], weight, bias, 1e-5)
        check_opcheck(namespace.layer_norm_fwd.default, x, [4], None, None, 1e-5)
        dy = torch.randn(3, 4)
        _, mean, rstd = namespace.layer_norm_fwd(x.detach(), [4], weight.detach(), None, 1e-5)
        for mask in ([True, True, True], [True, False, False], [False, True, True]):
            check_opcheck(namespace.layer_norm_bwd.default, dy, x.detach(), [4], mean, rstd, weight.detach(), mask)


@pytest.mark.compile
def test_compile():
    def fn(x, weight, bias):
        return ops.layer_norm(x, (x.shape[-1],), weight, bias) * 2

    first = (torch.randn(4, 6), torch.randn(6), torch.randn(6))
    check_compile(fn, [first, (torch.randn(7, 9), torch.randn(9), torch.randn(9))])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    x = torch.randn(3, 8, device=backend.device)
    weight, bias = torch.randn(8, device=backend.device), torch.randn(8, device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(backend, F.layer_norm, given, (8,), weight, bias, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=("torch",)))
def test_deterministic(backend):
    # 70 rows: more than one block of the two-stage sum for the weights
    shapes = (70, 24) if backend.slow else (1003, 257)
    x, weight, bias = (torch.randn(s, device=backend.device) for s in (shapes, shapes[1:], shapes[1:]))
    check_deterministic(lambda x, w, b: backend(x, shapes[1:], w, b), x, weight, bias)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_is_right(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        x = torch.randn(37, 50, dtype=torch.float64, requires_grad=True)  # 37 rows: never a multiple of the threads
        weight = torch.randn(50, dtype=torch.float64, requires_grad=True)
        got = torch.autograd.grad(ops.layer_norm(x, (50,), weight).pow(2).sum(), (x, weight))
        expected = torch.autograd.grad(F.layer_norm(x, (50,), weight).pow(2).sum(), (x, weight))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_kept_for_a_backward_nobody_wants():
    weight = torch.randn(4)
    with ops_called() as called:
        y = ops.layer_norm(torch.randn(2, 4), (4,), weight)
    assert not y.requires_grad and called.names.count("pydl::layer_norm_fwd") <= 1
    assert "pydl::layer_norm_bwd" not in called.names


def test_unbatched_vector_equals_a_row():
    x = torch.randn(9)
    assert_same_bits(ops.layer_norm(x, (9,)), ops.layer_norm(x[None], (9,))[0])


def test_arguments_as_torch_takes_them():
    x = torch.randn(3, 8)
    for shape in ((8,), [8], torch.Size([8]), (np.int64(8),), (torch.tensor(8),)):
        for eps in (1e-3, np.float32(1e-3), torch.tensor(1e-3)):
            torch.testing.assert_close(ops.layer_norm(x, shape, eps=eps), F.layer_norm(x, (8,), eps=1e-3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_go_to_torch():
    rows, weight, bias = [torch.randn(2, 8), torch.randn(3, 8)], torch.randn(8), torch.randn(8)
    y = ops.layer_norm(torch.nested.nested_tensor(rows), (8,), weight, bias)
    for one, row in zip(y.unbind(), rows):
        torch.testing.assert_close(one, F.layer_norm(row, (8,), weight, bias))
