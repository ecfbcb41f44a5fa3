"""layer_norm and rms_norm of long rows: a tile, a loop over tiles, and few rows of more than 32,768 cut into pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _backends import HAS_TRITON, available, backends_for
from _checks import assert_same_bits, check_deterministic

from pydl._grading import grade
from pydl.reference.layer_norm import layer_norm, layer_norm_grad, layer_norm_stats
from pydl.reference.rms_norm import rms_norm, rms_norm_grad

if HAS_TRITON:
    from pydl.kernels._launch import Device

    from pydl.kernels import layer_norm as layer_norm_kernels
    from pydl.kernels import rms_norm as rms_norm_kernels

EPS = 1e-5
BACKENDS = [p for op in ("layer_norm", "rms_norm") for p in backends_for(op, torch.float32, without=("torch",))]
BACKENDS = [pytest.param(*p.values, id=f"{p.values[0].op}-{p.id}", marks=p.marks) for p in BACKENDS]
TRITON = [b for b in available("layer_norm") if b.name == "triton"]
# beside tile sizes; in a loop over tiles; and in pieces, the last of them short or not, with both tiles of the sums
SHAPES = [(2, 2047), (2, 2048), (2, 2049), (2, 8193), (2, 20001), (3, 32769), (2, 65536), (1, 65539), (2, 100003)]
SHAPES += [(1, 2**19 + 3)]
CUT = (2, 32771)


def torchs(op, x, *parameters):
    n = x.shape[-1:]
    return F.layer_norm(x, n, *parameters, eps=EPS) if op == "layer_norm" else F.rms_norm(x, n, *parameters, eps=EPS)


def ours(backend, x, *parameters):
    return backend(x, x.shape[-1:], *parameters, eps=EPS)


def oracle(op, dy, x, *parameters):
    value, gradient = (layer_norm, layer_norm_grad) if op == "layer_norm" else (rms_norm, rms_norm_grad)
    return [value(x, x.shape[-1:], *parameters, eps=EPS), *gradient(dy, x, x.shape[-1:], *parameters, eps=EPS)]


def tensors(op, rows, n, dtype=torch.float32, device="cpu", mean=3.0):
    shapes = [n] * (2 if op == "layer_norm" else 1)
    parameters = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return [(mean + torch.randn(rows, n, device=device)).to(dtype), *parameters]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "n", "dtype"),
    [(*shape, torch.float32) for shape in SHAPES] + [(3, 32769, torch.bfloat16), (3, 32769, torch.float16)],
    ids=str,
)
def test_values_and_gradients(backend, rows, n, dtype):
    given = [t.requires_grad_() for t in tensors(backend.op, rows, n, dtype, backend.device)]
    y, theirs = ours(backend, *given), torchs(backend.op, *given)
    dy = torch.randn_like(y)
    wanted = oracle(backend.op, *(t.detach().double().cpu().numpy() for t in (dy, *given)))
    got = [y, *torch.autograd.grad(y, given, dy)]
    other = [theirs, *torch.autograd.grad(theirs, given, dy)]
    for i, triple in enumerate(zip(got, wanted, other, strict=True)):
        result = grade(*triple, dtype=dtype, gradient=i > 0, reduction=rows if i > 1 else 1)
        assert result.ok, (i, result)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_wanted_gradients(backend, frozen):
    given = tensors(backend.op, *CUT, device=backend.device)
    if frozen >= len(given):
        pytest.skip("rms_norm has no bias")
    wanted = [t.requires_grad_() for i, t in enumerate(given) if i != frozen]
    dy = torch.randn(CUT, device=backend.device)
    for a, b in zip(
        torch.autograd.grad(ours(backend, *given), wanted, dy),
        torch.autograd.grad(torchs(backend.op, *given), wanted, dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_parameters_and_rows_apart(backend):
    # a gap of 5 elements between rows, and one gradient for both
    x = torch.randn(CUT[0], CUT[1] + 5, device=backend.device)[:, 5:].requires_grad_()
    dy = torch.randn(1, CUT[1], device=backend.device).expand(CUT)
    got, expected = ours(backend, x), torchs(backend.op, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    pair = (torch.autograd.grad(y, x, dy)[0] for y in (got, expected))
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_gradients(backend):
    given = [t.double() for t in tensors(backend.op, *CUT)]
    dy, v = torch.randn(2, *CUT, dtype=torch.float64)

    def second(fn, dy, v, *given):
        leaves = [t.detach().requires_grad_() for t in (*given, dy)]
        dx, dweight = torch.autograd.grad(fn(*leaves[:-1]), leaves[:2], leaves[-1], create_graph=True)
        return torch.autograd.grad((dx * v).sum() + dweight.sum(), [leaves[0], leaves[1], leaves[-1]])

    expected = second(lambda *t: torchs(backend.op, *t), dy, v, *given)
    low = [t.float().to(backend.device) for t in (dy, v, *given)]
    for a, b in zip(second(lambda *t: ours(backend, *t), *low), expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    given = tensors(backend.op, *CUT, device=backend.device)
    check_deterministic(lambda *t: ours(backend, *t), *given, runs=2)


@pytest.mark.parametrize("backend", backends_for("layer_norm", torch.float32, without=("torch",)))
@pytest.mark.parametrize("outlier", [False, True])
def test_statistics_keep_their_digits(backend, outlier):
    # 40,001: ten pieces; mean 1e4 and deviation 1, and once a first element far from all others
    x = 1e4 + torch.randn(2, 40001)
    if outlier:
        x[:, 0] = -3e6
    namespace = {"cpu": torch.ops.pydl, "triton": torch.ops.pydl_triton}[backend.name]
    with backend.use():
        _, mean, rstd = namespace.layer_norm_fwd(x.to(backend.device), [40001], None, None, EPS)
    exact = [s.reshape(2) for s in layer_norm_stats(x.double().numpy(), (40001,))]
    np.testing.assert_allclose(mean.double().cpu().numpy(), exact[0], rtol=0, atol=1e-3)  # one unit in the last place
    np.testing.assert_allclose(rstd.double().cpu().numpy(), exact[1], rtol=1e-5)


def forward_and_backward(op, dy, x, parameters, mask):
    n = x.shape[-1:]
    if op == "layer_norm":
        y, mean, rstd = layer_norm_kernels.layer_norm_fwd(x, n, *parameters, EPS)
        return [y, mean, rstd, *layer_norm_kernels.layer_norm_bwd(dy, x, n, mean, rstd, parameters[0], mask)]
    y, rstd = rms_norm_kernels.rms_norm_fwd(x, n, *parameters, EPS)
    return [y, rstd, *rms_norm_kernels.rms_norm_bwd(dy, x, n, rstd, parameters[0], mask[:2])]


@pytest.mark.parametrize("backend", TRITON, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("mask", [(True, True, True), (True, False, True)])
def test_groups_of_rows_add_up(backend, op, mask, monkeypatch):
    # two groups, as 32 rows and more have: 9 rows are three blocks of four, the last with one row
    x, *parameters = tensors(op, 9, 32769, device=backend.device)
    dy = torch.randn_like(x)
    exact = oracle(op, *(t.double().cpu().numpy() for t in (dy, x, *parameters)))
    split = layer_norm_kernels.row_split(9, 32769)._replace(groups=2)
    for module in (layer_norm_kernels, rms_norm_kernels):
        monkeypatch.setattr(module, "row_split", lambda M, N: split)
    y, *_ = results = forward_and_backward(op, dy, x, parameters, mask)
    found = [y, *results[1 - len(exact) :]]
    for got, wanted, asked in zip(found, exact, (True, *mask)[: len(exact)], strict=True):
        if asked:
            np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=1e-5, atol=5e-5)
        else:
            assert got.shape == (0,)


@pytest.mark.parametrize("backend", TRITON, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_the_device_has_no_say_in_the_pieces(backend, op, monkeypatch):
    x, *parameters = tensors(op, *CUT, device=backend.device)
    results = []
    for device in (Device(80, 16), Device(120, 188)):
        for module in (layer_norm_kernels, rms_norm_kernels):
            monkeypatch.setattr(module, "device_facts", lambda x, device=device: device)
        results.append(forward_and_backward(op, x, x, parameters, (True, True, True)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
