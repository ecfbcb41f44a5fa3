"""batch_norm and batch_norm_act on every backend: values, gradients, running statistics, layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _backends import backends_and_dtypes, backends_for
from _checks import (
    assert_same_bits,
    check_cases,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    ops_called,
)

import pydl
from pydl import ops
from pydl._grading import grade
from pydl.ops.batch_norm import torch_batch_norm_act
from pydl.reference.batch_norm import (
    act_cases,
    batch_norm,
    batch_norm_grad,
    batch_norm_stats,
    cases,
    running_stats,
)

OP, ACT = "batch_norm", "batch_norm_act"
CASES = {case.name: case for case in cases()}
ACT_CASES = {case.name: case for case in act_cases()}
TORCH = ("torch",)
LAST, LAST3D = torch.channels_last, torch.channels_last_3d
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
# as many elements as the fibers of the SIMT runner can go through in a moment; one dtype runs the larger cases
HEAVY = ("3x2x70x70", "1x2x20000", "600x33", "long planes")


def act(backend):
    """The same backend of batch_norm_act."""
    return replace(backend, op=ACT)


def keep(backend, dtype):
    return lambda case: not (backend.slow and dtype != torch.float32 and case.name in HEAVY)


def buffers(channels, dtype=torch.float32, device="cpu"):
    return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)


# torch's own operations in one dtype only: what they do in others is torch's affair
PAIRS = [*backends_and_dtypes(OP, without=TORCH), *(p for p in backends_and_dtypes(OP) if p.id == "torch-float32")]

# values and gradients against the oracle


@pytest.mark.parametrize("op", [OP, ACT])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS)
@pytest.mark.parametrize("level", ["values", "gradients", "second"])
def test_cases(op, backend, dtype, level):
    check_cases(replace(backend, op=op), dtype, level, keep(backend, dtype))


@pytest.mark.parametrize("backend", backends_for(OP, torch.bfloat16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_with_float32_parameters(backend, low):
    # what autocast and mixed-precision models give; 9 channels of 15: neither is a vector
    x = torch.randn(3, 9, 5, 3, device=backend.device).to(low).requires_grad_()
    weight, bias = (torch.randn(9, device=backend.device, requires_grad=True) for _ in range(2))
    mean, var = buffers(9, device=backend.device)
    dy = torch.randn(3, 9, 5, 3, device=backend.device).to(low)
    y = backend(x, mean, var, weight, bias, True)
    assert y.dtype == low
    exact = [t.detach().double().cpu().numpy() for t in (x, weight, bias)]
    assert grade(y, batch_norm(exact[0], None, None, *exact[1:], True), dtype=low).ok
    for got, wanted in zip((mean, var), running_stats(np.zeros(9), np.ones(9), exact[0]), strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=1e-5, atol=1e-7)  # atol: of deviations near 1
    oracle = batch_norm_grad(dy.double().cpu().numpy(), exact[0], None, None, *exact[1:], True)
    tensors = (x, weight, bias)
    for got, wanted, tensor in zip(torch.autograd.grad(y, tensors, dy), oracle, tensors, strict=True):
        assert got.dtype == tensor.dtype
        assert grade(got, wanted, dtype=tensor.dtype, gradient=True, reduction=45).ok


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("last", [False, True])
def test_large_mean_keeps_its_digits(backend, last):
    # mean 1e4, deviation 1: E[x^2] - E[x]^2 in float32 would have no correct digit left. The zeros in front are what a
    # shift by the first values gets wrong.
    for zeros in (0, 2):
        x = 1e4 + torch.randn(6, 5, 9, 8)
        x[:zeros] = 0
        if last:
            x = x.contiguous(memory_format=LAST)
        x = x.to(backend.device)
        mean, var = buffers(5, device=backend.device)
        y = backend(x, mean, var, training=True, momentum=1.0, biased_running_var=True)
        exact = x.double().cpu().numpy()
        # one unit in the last place of the mean, 1e-3, over a deviation of 1
        assert grade(y, batch_norm(exact, None, None, training=True)).err < 2e-3
        for got, wanted in zip((mean, var), batch_norm_stats(exact), strict=True):
            np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False])
def test_only_the_wanted_gradients(backend, frozen, training):
    tensors = {"x": torch.randn(3, 8, 5), "weight": torch.randn(8), "bias": torch.randn(8)}
    tensors["residual"] = torch.randn(3, 8, 5)
    tensors = {k: v.to(backend.device).requires_grad_(k != frozen) for k, v in tensors.items()}
    wanted = [v for k, v in tensors.items() if k != frozen]
    mean, var = buffers(8, device=backend.device)

    def gradients(op, activation):
        x, weight, bias, residual = tensors.values()
        y = op(x, mean, var, weight, bias, training, 0.0, residual=residual, activation=activation)
        return torch.autograd.grad((y * y).sum(), wanted)

    for activation in (None, "relu"):
        ours, theirs = gradients(act(backend), activation), gradients(torch_batch_norm_act, activation)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# running statistics


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
@pytest.mark.parametrize("biased", [False, True])
def test_running_statistics(backend, dtype, biased):
    # three steps with different momenta; two layouts and the rows of a 2-D batch
    for shape, last in (((4, 6, 5, 3), False), ((4, 6, 5, 3), True), ((7, 6), False)):
        mean, var = buffers(6, dtype, backend.device)
        exact_mean, exact_var = np.zeros(6), np.ones(6)
        for momentum in (1.0, 0.1, 0.25):
            x = (2 + torch.randn(shape)).to(dtype)
            x = x.contiguous(memory_format=LAST) if last else x
            exact_mean, exact_var = running_stats(exact_mean, exact_var, x.double().numpy(), momentum, biased)
            backend(x.to(backend.device), mean, var, training=True, momentum=momentum, biased_running_var=biased)
        for got, wanted in ((mean, exact_mean), (var, exact_var)):
            assert got.dtype == dtype
            # three roundings in the dtype of the buffers
            np.testing.assert_allclose(got.double().cpu().numpy(), wanted, rtol=6 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_running_statistics_are_updated_where_they_lie(backend):
    x = torch.randn(4, 3, 5, device=backend.device)
    wide = torch.full((2, 6), 7.0, device=backend.device)
    mean, var = wide[0, ::2], wide[1, 1::2]  # strided views
    backend(x, mean, var, training=True, momentum=1.0)
    assert torch.equal(wide[0, 1::2], torch.full((3,), 7.0, device=backend.device)) and (wide[1, ::2] == 7).all()
    torch.testing.assert_close(mean, x.mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, x.var((0, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_evaluation_and_empty_batches_leave_the_running_statistics_alone(backend):
    mean, var = (t + 2 for t in buffers(3, device=backend.device))
    for shape, training in (((4, 3, 5), False), ((0, 3, 5), True), ((2, 3, 0), True), ((0, 3), False)):
        y = backend(torch.randn(shape, device=backend.device), mean, var, training=training)
        assert y.shape == torch.Size(shape) and (mean == 2).all() and (var == 3).all()


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_infinite_and_missing_values_reach_the_running_statistics_as_torch_s(backend):
    x = torch.randn(4, 3, 6)
    x[0, 0, 0], x[1, 1, 1] = float("nan"), float("inf")
    for memory in (x, x.permute(0, 2, 1).reshape(-1, 3)):
        ours, theirs = buffers(3, device=backend.device), buffers(3)
        backend(memory.to(backend.device), *ours, training=True)
        F.batch_norm(memory, *theirs, training=True)
        for a, b in zip(ours, theirs, strict=True):
            if backend.name != "cpu":  # merged means make NaN of infinity, here as in torch's CUDA kernels
                b = torch.where(b.isinf(), torch.nan, b)
            torch.testing.assert_close(a.cpu(), b, equal_nan=True)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_a_training_step_before_the_backward_does_not_change_it(backend):
    x = torch.randn(4, 3, 5, device=backend.device, requires_grad=True)
    mean, var = buffers(3, device=backend.device)
    y = backend(x, mean, var)
    expected = torch.ones_like(x) * torch.rsqrt(var + 1e-5).view(1, 3, 1)
    backend(5 + 3 * torch.randn(4, 3, 5, device=backend.device), mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
def test_gradcheck(backend, training, parameters):
    if backend.name == "torch" and parameters == "bias":
        pytest.skip("torch 2.13's second derivative without weight forgets the bias")
    if backend.slow and parameters in ("weight", "bias"):
        pytest.skip("the derivatives are the same formulas on every backend")
    # 3 x 2 x 2: small because gradgradcheck is quadratic in the size
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=backend.device, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, device=backend.device, requires_grad=True) for _ in range(2))
    mean, var = buffers(2, torch.float64, backend.device)
    names = {"both": ("weight", "bias"), "none": ()}.get(parameters, (parameters,))
    given = {name: t for name, t in (("weight", weight), ("bias", bias)) if name in names}

    def fn(x, *tensors):
        return backend(x, mean, var, **dict(zip(given, tensors)), training=training, momentum=0.0, eps=1e-2)

    check_gradcheck(fn, [x, *given.values()])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64, without=TORCH))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (4, 2)], ids=str)
def test_gradcheck_with_addition_and_relu(backend, training, shape):
    channels = shape[1]
    x = torch.randn(shape, dtype=torch.float64, device=backend.device)
    if len(shape) == 4:
        x = x.contiguous(memory_format=LAST)
    # far from the kink: no difference of two steps crosses it
    residual = 6 * torch.sign(torch.randn(shape, dtype=torch.float64, device=backend.device))
    weight, bias = (torch.randn(channels, dtype=torch.float64, device=backend.device) for _ in range(2))
    mean, var = buffers(channels, torch.float64, backend.device)

    def fn(x, weight, bias, residual):
        tail = {"residual": residual, "activation": "relu"}
        return act(backend)(x, mean, var, weight, bias, training, 0.0, 1e-2, **tail)

    check_gradcheck(fn, [t.requires_grad_() for t in (x, weight, bias, residual)], second=not backend.slow)


def test_third_derivative_equals_the_formulas():
    # against the formula in elementary ops: a derivative that takes the saved statistics for constants fails here
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def formula(x):
        variance, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5)

    def third(op):
        (g,) = torch.autograd.grad(op(x).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), x)[0]

    with pydl.backend("cpu"):
        torch.testing.assert_close(third(lambda x: ops.batch_norm(x, None, None, training=True)), third(formula))


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    for name in ("4x9x5x7", "4x9x5x7 eval"):
        check_layouts(backend, dtype, CASES[name])
    check_layouts(act(backend), dtype, ACT_CASES["add and relu, train"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 16, 31, 33, 64, 65])  # vector widths and their neighbours
@pytest.mark.parametrize("training", [True, False])
def test_layout_is_kept(backend, channels, training):
    for size, memory_format in (((4, 5), LAST), ((2, 3, 2), LAST3D)):
        plain = torch.randn(3, channels, *size, device=backend.device)
        weight, bias = torch.randn(channels, device=backend.device), torch.randn(channels, device=backend.device)
        residual = torch.randn_like(plain)
        padded = torch.randn(3, *size, channels + 3, device=backend.device).movedim(-1, 1)
        results = []
        for x in (plain, plain.contiguous(memory_format=memory_format), padded[:, :channels].copy_(plain)):
            x = x.detach().requires_grad_()
            mean, var = buffers(channels, device=backend.device)
            tail = {"residual": residual, "activation": "relu"}
            y = act(backend)(x, mean, var, weight, bias, training, **tail)
            (dx,) = torch.autograd.grad(y, x, residual)
            assert y.is_contiguous(memory_format=torch.contiguous_format if x is plain else memory_format) or (
                x.is_contiguous() and y.is_contiguous()
            )
            assert dx.stride() == y.stride()
            results.append((y.detach(), dx, mean, var))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_gradient_of_any_layout(backend):
    # y.sum().backward() gives a gradient with stride 0; a following transpose gives one with swapped strides
    x = torch.randn(6, 5, 4, device=backend.device, requires_grad=True)
    for dy in (torch.ones((), device=x.device).expand(6, 5, 4), torch.randn(6, 4, 5, device=x.device).mT):
        got = torch.autograd.grad(backend(x, None, None, training=True), x, dy)
        expected = torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, dy)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0), (2, 3, 0, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_do(backend, shape, training):
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    weight, bias = (torch.ones(3, device=backend.device, requires_grad=True) for _ in range(2))
    y = act(backend)(x, *buffers(3, device=backend.device), weight, bias, training, activation="relu")
    assert y.shape == torch.Size(shape)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert dx.shape == x.shape
    # no value contributes: the sums are zero, not what the memory held
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_no_output_is_an_input(backend):
    x = torch.randn(4, 3, 5, device=backend.device)
    residual = torch.randn(4, 3, 5, device=backend.device, requires_grad=True)
    y = act(backend)(x, None, None, training=True, residual=residual)
    assert y.data_ptr() not in (x.data_ptr(), residual.data_ptr())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    # few and many channels, rows that leave a part of a wide row over, planes of several pieces
    shapes = (((9, 3, 40, 41), None), ((7, 40, 9, 9), None), ((700, 37), None), ((5, 67, 12, 13), LAST))
    before = torch.get_num_threads()
    try:
        for shape, memory_format in shapes:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
            x = x.contiguous(memory_format=memory_format) if memory_format else x
            runs = []
            for count in (1, threads):
                torch.set_num_threads(count)
                leaf, mean, var = x.clone().requires_grad_(), *buffers(shape[1])
                y = ops.batch_norm_act(leaf, mean, var, training=True, residual=x, activation="relu")
                runs.append((y.detach(), mean, var, *torch.autograd.grad(y, leaf, x)))
            for a, b in zip(*runs, strict=True):
                assert_same_bits(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("shape", [(70, 24), (6, 5, 20, 20)], ids=str)
def test_deterministic(backend, shape):
    x, weight, bias = (torch.randn(s, device=backend.device) for s in (shape, shape[1], shape[1]))
    check_deterministic(lambda x, w, b: backend(x, None, None, w, b, True), x, weight, bias)


# which operator runs


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_a_bit_per_element_is_kept_where_a_gradient_is_wanted(backend):
    raw = NAMESPACES[backend.name]
    x, (mean, var) = torch.randn(2, 3, 5, 5, device=backend.device), buffers(3, device=backend.device)
    with backend.use():
        y, bits = raw.batch_norm_eval(x, mean, var, None, None, None, True, 1e-5, True)
        assert bits.shape == (2 * 3 * 4,) and bits.dtype == torch.uint8  # 25 positions: 4 bytes for each plane
        planes = np.unpackbits(bits.cpu().numpy().reshape(6, 4), axis=1, bitorder="little")[:, :25]
        assert np.array_equal(planes.reshape(x.shape).astype(bool), (y > 0).cpu().numpy())
        assert raw.batch_norm_eval(x, mean, var, None, None, None, True, 1e-5, False)[1].shape == (0,)
        last = x.contiguous(memory_format=LAST)
        y, bits = raw.batch_norm_eval(last, mean, var, None, None, None, True, 1e-5, True)
        assert bits.shape == ((2 * 25 * 3 + 7) // 8,)
        rows = np.unpackbits(bits.cpu().numpy(), bitorder="little")[:150].reshape(2, 5, 5, 3)
        assert np.array_equal(rows.astype(bool), (y > 0).permute(0, 2, 3, 1).cpu().numpy())
        # called without them, the derivative finds them itself
        leaf = x.clone().requires_grad_()
        y, _ = raw.batch_norm_eval(leaf, mean, var, None, None, None, True, 1e-5, False)
        (dx,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(dx, (y > 0) / torch.sqrt(var + 1e-5).view(1, 3, 1, 1))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_operators_that_a_call_needs(backend):
    x, (mean, var) = torch.randn(4, 3, device=backend.device), buffers(3, device=backend.device)
    with ops_called() as called:
        backend(x, mean, var)
    assert set(called.pydl()) == {"batch_norm_eval"}
    with ops_called() as called:
        backend(x, None, None, training=True)
    assert set(called.pydl()) == {"batch_norm_train"}
    with ops_called() as called:
        backend(x, mean, var, training=True)
    assert set(called.pydl()) == {"batch_norm_train", "batch_norm_update"}
