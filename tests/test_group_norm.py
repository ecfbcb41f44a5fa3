"""group_norm and instance_norm on every backend: values, gradients, running statistics, layouts, edge sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _backends import backends_and_dtypes, backends_for
from _checks import assert_same_bits, check_cases, check_deterministic, check_gradcheck, check_layouts

from pydl import ops
from pydl._grading import grade
from pydl.ops.group_norm import torch_group_norm
from pydl.reference.group_norm import (
    cases,
    group_norm,
    group_norm_grad,
    instance_cases,
    instance_running_stats,
)

OP, INSTANCE = "group_norm", "instance_norm"
CASES = {case.name: case for case in cases()}
INSTANCE_CASES = {case.name: case for case in instance_cases()}
TORCH = ("torch",)
LAST, LAST3D = torch.channels_last, torch.channels_last_3d
ACTIVATIONS = (None, "relu", "silu")
# as many elements as the fibers of the SIMT runner can go through in a moment; one dtype runs the larger cases
HEAVY = ("1x2x70x70 by 1", "1x2x20000 by 1")
# torch's own operations in one dtype only: what they do in others is torch's affair
PAIRS = [*backends_and_dtypes(OP, without=TORCH), *(p for p in backends_and_dtypes(OP) if p.id == "torch-float32")]
NATIVE = backends_for(OP, torch.float32, without=TORCH)


def keep(backend, dtype):
    if backend.name == "torch":  # whose backward fails for a bias without a weight, and leaves NaN in empty sums
        return lambda case: case.name not in ("bias only", "no positions")
    return lambda case: not (backend.slow and dtype != torch.float32 and case.name in HEAVY)


def instance(backend):
    """The same backend of instance_norm."""
    return replace(backend, op=INSTANCE)


# values and gradients against the oracle


@pytest.mark.parametrize("op", [OP, INSTANCE])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS)
@pytest.mark.parametrize("level", ["values", "gradients", "second"])
def test_cases(op, backend, dtype, level):
    check_cases(replace(backend, op=op), dtype, level, keep(backend, dtype))


@pytest.mark.parametrize("backend", backends_for(OP, torch.bfloat16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_half_precision_input_with_float32_parameters(backend, low, activation):
    x = torch.randn(3, 9, 5, 3, device=backend.device).to(low).requires_grad_()
    weight, bias = (torch.randn(9, device=backend.device, requires_grad=True) for _ in range(2))
    dy = torch.randn(3, 9, 5, 3, device=backend.device).to(low)
    y = backend(x, 3, weight, bias, activation=activation)
    assert y.dtype == low
    exact = [t.detach().double().cpu().numpy() for t in (x, weight, bias)]
    assert grade(y, group_norm(exact[0], 3, *exact[1:], activation=activation), dtype=low).ok
    oracle = group_norm_grad(dy.double().cpu().numpy(), exact[0], 3, *exact[1:], activation=activation)
    tensors = (x, weight, bias)
    for got, wanted, tensor in zip(torch.autograd.grad(y, tensors, dy), oracle, tensors, strict=True):
        assert got.dtype == tensor.dtype
        assert grade(got, wanted, dtype=tensor.dtype, gradient=True, reduction=45).ok


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("last", [False, True])
def test_large_mean_keeps_its_digits(backend, last):
    # mean 1e4, deviation 1: E[x^2] - E[x]^2 in float32 would have no correct digit left. The zeros are what a shift by
    # the first values gets wrong, for a whole channel or for the first positions.
    for zeros in (None, (slice(None), slice(0, 2)), (slice(None), slice(None), slice(0, 3))):
        x = 1e4 + torch.randn(3, 6, 9, 8)
        if zeros is not None:
            x[zeros] = 0
        if last:
            x = x.contiguous(memory_format=LAST)
        x = x.to(backend.device)
        exact = x.double().cpu().numpy()
        # one unit in the last place of the mean, 1e-3, over a deviation of 1
        assert grade(backend(x, 2), group_norm(exact, 2)).err < 2e-3
        assert grade(instance(backend)(x), group_norm(exact, 6)).err < 2e-3


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_the_wanted_gradients(backend, activation):
    # beside those of a call that wants all: torch 2.13 itself crashes on channels_last without the input's
    for shape, last in (((3, 8, 5, 2), False), ((3, 8, 5, 2), True), ((5, 8), False)):
        x = torch.randn(shape, device=backend.device)
        x = x.contiguous(memory_format=LAST) if last else x
        tensors = [x, torch.randn(8, device=backend.device), torch.randn(8, device=backend.device)]
        results = []
        for frozen in (None, 0, 1, 2):
            leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
            y = backend(leaves[0], 2, *leaves[1:], activation=activation)
            wanted = [i for i in range(3) if i != frozen]
            results.append(
                dict(zip(wanted, torch.autograd.grad((y * y).sum(), [leaves[i] for i in wanted]), strict=True))
            )
        for other in results[1:]:
            for i, gradient in other.items():
                assert_same_bits(gradient, results[0][i])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_as_torch_gives_them(backend, activation):
    x = torch.randn(2, 6, 4, 5, device=backend.device)
    x[0, 1, 2, 2], x[1, 4, 0, 0] = float("nan"), float("inf")
    weight, bias = (torch.randn(6, device=backend.device) for _ in range(2))
    bias[2] = float("nan")  # a single channel: relu's gradient passes
    expected = torch_group_norm(x, 3, weight, bias, activation=activation)
    for given in (x, x.contiguous(memory_format=LAST)):
        y = backend(given, 3, weight, bias, activation=activation)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    leaves = [t.clone().requires_grad_() for t in (torch.randn_like(x), weight, bias)]
    results = [
        torch.autograd.grad(op(leaves[0], 3, *leaves[1:], activation=activation)[:, :2].sum(), leaves)
        for op in (backend, torch_group_norm)
    ]
    torch.testing.assert_close(results[0][0][:, :2], results[1][0][:, :2], rtol=1e-4, atol=1e-4)


# running statistics


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_running_statistics(backend, dtype):
    for shape, last in (((4, 6, 5, 3), False), ((4, 6, 5, 3), True), ((3, 6, 7), False)):
        mean = torch.zeros(6, dtype=dtype, device=backend.device)
        var = torch.ones(6, dtype=dtype, device=backend.device)
        exact = np.zeros(6), np.ones(6)
        for momentum in (1.0, 0.1, 0.25):
            x = (2 + torch.randn(shape)).to(dtype)
            x = x.contiguous(memory_format=LAST) if last else x
            exact = instance_running_stats(*exact, x.double().numpy(), momentum)
            y = instance(backend)(x.to(backend.device), mean, var, momentum=momentum)
            assert y.dtype == dtype
        for got, wanted in zip((mean, var), exact, strict=True):
            # each step rounds to the dtype
            assert grade(got, wanted, dtype=dtype, gradient=True, reduction=3).ok


@pytest.mark.parametrize("backend", NATIVE)
def test_running_statistics_are_used_and_left_alone(backend):
    x = torch.randn(3, 5, 4, device=backend.device, requires_grad=True)
    mean, var = torch.randn(5, device=backend.device), torch.rand(5, device=backend.device) + 0.5
    kept = mean.clone(), var.clone()
    y = instance(backend)(x, mean, var, use_input_stats=False)
    expected = F.instance_norm(x, mean, var, use_input_stats=False)
    torch.testing.assert_close(y, expected)
    mean.fill_(7)  # a step between forward and backward
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x) / (var + 1e-5).sqrt().view(5, 1))
    mean.copy_(kept[0])
    instance(backend)(torch.empty(0, 5, 4, device=backend.device), mean, var)
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(backend, activation):
    def double(*shape):
        return torch.randn(shape, dtype=torch.float64, device=backend.device, requires_grad=True)

    weight, bias = double(4), double(4)
    for x in (double(2, 4, 3), double(3, 4)):
        check_gradcheck(lambda x, w, b: backend(x, 2, w, b, 1e-3, activation=activation), [x, weight, bias])
    check_gradcheck(lambda x, w, b: instance(backend)(x, None, None, w, b, eps=1e-3), [double(2, 4, 3), weight, bias])


def test_third_derivative_equals_torchs():
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def third(op, activation):
        (g,) = torch.autograd.grad(op(x, 2, weight, None, activation=activation).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), (x, weight))

    def composed(x, groups, weight, bias, activation):  # torch's own second derivative ends there
        var, mean = torch.var_mean(x.view(2, groups, -1), 2, correction=0, keepdim=True)
        y = ((x.view(2, groups, -1) - mean) / (var + 1e-5).sqrt()).view(x.shape) * weight.view(4, 1)
        return F.silu(y) if activation else y

    for activation in (None, "silu"):
        for a, b in zip(third(ops.group_norm, activation), third(composed, activation), strict=True):
            torch.testing.assert_close(a, b)


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    for name in ("4x9x5x7 by 3", "4x9x5x7, silu"):
        check_layouts(backend, dtype, CASES[name])
    check_layouts(instance(backend), dtype, INSTANCE_CASES["4x9x5x7"])


@pytest.mark.parametrize("backend", NATIVE)
# vector widths and their neighbours, one channel, and groups of packs, of parts of packs, of several packs
@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (2, 1), (7, 7), (8, 2), (9, 3), (16, 16), (31, 1), (64, 4), (66, 3), (80, 2)]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layout_is_kept(backend, channels, groups, activation):
    for size, memory_format in (((4, 5), LAST), ((2, 3, 2), LAST3D)):
        plain = torch.randn(3, channels, *size, device=backend.device)
        weight, bias = (start + 0.3 * torch.randn(channels, device=backend.device) for start in (1, 0))
        dy = torch.randn_like(plain)
        padded = torch.randn(3, *size, channels + 3, device=backend.device).movedim(-1, 1)
        results = []
        for x in (plain, plain.contiguous(memory_format=memory_format), padded[:, :channels].copy_(plain)):
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            y = backend(leaves[0], groups, *leaves[1:], activation=activation)
            gradients = torch.autograd.grad(y, leaves, dy)
            assert y.is_contiguous(memory_format=torch.contiguous_format if x is plain else memory_format) or (
                x.is_contiguous() and y.is_contiguous()
            )
            assert gradients[0].stride() == y.stride()
            results.append((y.detach(), *gradients))
        exact = [t.double().cpu().numpy() for t in (dy, plain, weight, bias)]
        wanted = group_norm(exact[1], groups, *exact[2:], activation=activation)
        theirs = torch_group_norm(plain, groups, weight, bias, activation=activation)
        assert grade(results[0][0], wanted, theirs).ok
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", NATIVE)
def test_gradient_of_any_layout(backend):
    x = torch.randn(6, 4, 5, device=backend.device, requires_grad=True)
    for dy in (torch.ones((), device=x.device).expand(6, 4, 5), torch.randn(6, 5, 4, device=x.device).mT):
        got = torch.autograd.grad(backend(x, 2), x, dy)
        torch.testing.assert_close(got, torch.autograd.grad(F.group_norm(x, 2), x, dy), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", NATIVE)  # torch leaves NaN in the sums
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 2, 2), (2, 4, 0), (2, 4, 0, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_nothing_to_do(backend, shape, activation):
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    weight, bias = (torch.ones(shape[1], device=backend.device, requires_grad=True) for _ in range(2))
    y = backend(x, 2, weight, bias, activation=activation)
    assert y.shape == torch.Size(shape)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert dx.shape == x.shape
    # no value contributes: the sums are zero, not what the memory held
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("backend", NATIVE)
def test_groups_of_one_value(backend):
    for shape in ((4, 6), (3, 6, 1), (3, 6, 1, 1)):
        x = torch.randn(shape, device=backend.device, requires_grad=True)
        weight, bias = torch.randn(6, device=backend.device), torch.randn(6, device=backend.device)
        y = backend(x, 6, weight, bias)
        assert torch.equal(y, bias.view(6, *[1] * (len(shape) - 2)).expand(shape))
        assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("backend", NATIVE)
def test_no_output_is_an_input(backend):
    x = torch.randn(4, 4, 5, device=backend.device)
    assert backend(x, 2).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    # few and many groups, planes of several pieces, rows that leave a part of a wide row over, single positions
    shapes = (((2, 4, 90, 211), 2, None), ((7, 40, 9, 9), 8, None), ((700, 36), 4, None), ((5, 66, 12, 13), 3, LAST))
    before = torch.get_num_threads()
    try:
        for shape, groups, memory_format in (*shapes, ((40, 8, 5, 5), 8, LAST)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
            x = x.contiguous(memory_format=memory_format) if memory_format else x
            runs = []
            for count in (1, threads):
                torch.set_num_threads(count)
                leaves = [t.requires_grad_() for t in (x.clone(), torch.ones(shape[1]), torch.ones(shape[1]))]
                y = ops.group_norm(leaves[0], groups, *leaves[1:], activation="silu")
                runs.append((y.detach(), *torch.autograd.grad(y, leaves, x)))
            for a, b in zip(*runs, strict=True):
                assert_same_bits(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("shape", [(70, 24), (6, 4, 20, 20)], ids=str)
def test_deterministic(backend, shape):
    x, weight, bias = (torch.randn(s, device=backend.device) for s in (shape, shape[1], shape[1]))
    check_deterministic(lambda x, w, b: backend(x, 2, w, b, activation="silu"), x, weight, bias)
