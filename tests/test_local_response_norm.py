"""local_response_norm on every backend: values, gradients, second derivatives, layouts, errors, torch's machinery."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
from _simt import UNDER_ASAN, build_simt_library, load_simt_library, sanitizer_environment

import pydl
from pydl import ops
from pydl._grading import grade
from pydl.reference.local_response_norm import cases, local_response_norm, local_response_norm_grad

OP = "local_response_norm"
CASES = {case.name: case for case in cases()}
TORCH = ("torch",)
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}
CHANNELS_LAST = torch.channels_last
WIDE = (torch.float32, torch.float64)


def pairs():
    """Torch's composition pools planes of half precision on a GPU only."""
    return [p for p in backends_and_dtypes(OP) if p.values[0].name != "torch" or p.values[1] in WIDE]


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients")


@pytest.mark.parametrize(("backend", "dtype"), pairs())
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("channels", [1, 2, 5, 15, 17, 64, 67, 129])  # beside vectors, tiles of 128 and bands of 64
def test_sizes_in_both_layouts(backend, channels):
    # planes of 1, 3 x 11 (one over a tile of 32) and, where calls are cheap, 5 x 13 elements
    for plane in ((1, 1), (3, 11)) if backend.slow else ((1, 1), (3, 11), (5, 13)):
        for size, beta in ((1, 0.75), (4, 0.75), (5, 0.6), (35, 0.75)):
            x = torch.randn(2, channels, *plane, device=backend.device)
            dy = torch.randn_like(x)
            arrays = [t.double().cpu().numpy() for t in (dy, x)]
            other = x.clone().requires_grad_()
            theirs = F.local_response_norm(other, size, 2.0, beta, 1.5)
            (their_dx,) = torch.autograd.grad(theirs, other, dy)
            for memory_format in (torch.contiguous_format, CHANNELS_LAST):
                leaf = x.contiguous(memory_format=memory_format).requires_grad_()
                y = backend(leaf, size, 2.0, beta, 1.5)
                assert y.is_contiguous(memory_format=memory_format)
                assert grade(y, local_response_norm(arrays[1], size, 2.0, beta, 1.5), theirs).ok
                (dx,) = torch.autograd.grad(y, leaf, dy)
                assert dx.is_contiguous(memory_format=memory_format)
                wanted = local_response_norm_grad(*arrays, size, 2.0, beta, 1.5)[0]
                assert grade(dx, wanted, their_dx, gradient=True, reduction=min(size, channels)).ok


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_nan_and_infinity_stay_in_their_windows(backend, memory_format):
    x = torch.ones(1, 40, 2, 2, device=backend.device)
    x[0, 10, 0, 0], x[0, 30, 1, 1] = float("nan"), float("inf")
    y = backend(x.contiguous(memory_format=memory_format), 5)
    expected = F.local_response_norm(x, 5)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[0, :, 0, 0].isnan().nonzero().flatten().tolist() == [8, 9, 10, 11, 12]
    assert y[0, :, 1, 1].isnan().nonzero().flatten().tolist() == [30]
    assert (y[0, :, 1, 1] == 0).nonzero().flatten().tolist() == [28, 29, 31, 32]


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@pytest.mark.parametrize("beta", [0.75, 0.5, 0.6, 1.0, 2.0, 3.0, 0.0, -0.75, -1.0])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_powers_of_any_sum(backend, beta, dtype):
    # one channel, alpha 0: the sum is k, and y its power: zero, negative, subnormal, huge and infinite sums
    x = torch.ones(1, 1, 3, device=backend.device, dtype=dtype)
    for k in (0.0, 1e-41, 1e-30, 0.3, 1.0, 7.0, 1e25, -2.0, float("inf"), float("nan")):
        with np.errstate(all="ignore"):
            exact = np.float64(1) / np.power(np.float64(torch.tensor(k, dtype=dtype)), beta)
            rounded = exact.astype(np.float32 if dtype == torch.float32 else np.float64)
        slope = abs(np.log(k)) if 0 < k < np.inf else 0  # what an exponent rounded to the dtype is off by
        tiny = abs(rounded) < torch.finfo(dtype).tiny * 4  # such results may be flushed
        y = backend(x, 1, 0.0, beta, k)
        expected = torch.full_like(y, float(rounded))
        torch.testing.assert_close(
            y,
            expected,
            rtol=torch.finfo(dtype).eps * (8 + slope),
            atol=abs(float(rounded)) if tiny else 0,
            equal_nan=True,
            msg=lambda m, k=k: f"k {k}: {m}",
        )


@pytest.mark.parametrize("backend", backends_for(OP, torch.float16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(backend, low):
    # squares of 300 pass fp16's largest number: torch's composition in fp16 gives zeros
    x = torch.full((1, 6, 2, 2), 300.0, dtype=low, device=backend.device)
    y = backend(x, 5, 1.0, 0.75, 1.0)
    assert y.dtype == low and grade(y, local_response_norm(x.double().cpu().numpy(), 5, 1.0), dtype=low).ok


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize(("size", "beta"), [(3, 0.75), (4, 1.3), (9, 0.75)])
def test_gradcheck(backend, size, beta):
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64, device=backend.device, requires_grad=True)
    check_gradcheck(lambda t: backend(t, size, 1.5, beta, 0.7), [x])


def test_third_derivative_equals_torchs():
    x = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)

    def third(op):
        (g,) = torch.autograd.grad(op(x, 4, 1.0, 0.75, 1.0).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), x)[0]

    with pydl.backend("cpu"):
        torch.testing.assert_close(third(ops.local_response_norm), third(F.local_response_norm))


# layouts and edge sizes


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["planes"])
    check_layouts(backend, dtype, CASES["sequence"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_volumes_keep_channels_last(backend):
    x = torch.randn(2, 6, 3, 2, 5, device=backend.device).contiguous(memory_format=torch.channels_last_3d)
    leaf = x.requires_grad_()
    y = backend(leaf, 3)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.autograd.grad(y.sum(), leaf)[0].is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, F.local_response_norm(x, 3))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 0, 0), (1, 2, 0, 3, 4)])
def test_nothing_to_do(backend, shape):
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    y = backend(x, 5)
    assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_gradient_of_any_layout(backend):
    x = torch.randn(2, 6, 3, 4, device=backend.device)
    for given in (x, x.contiguous(memory_format=CHANNELS_LAST)):
        leaf = given.clone(memory_format=torch.preserve_format).requires_grad_()
        y, expected = backend(leaf, 3, 1.0), F.local_response_norm(leaf, 3, 1.0)
        for dy in (torch.ones((), device=x.device).expand(y.shape), torch.randn(2, 3, 6, 4).transpose(1, 2).to(x)):
            a, b = (torch.autograd.grad(out, leaf, dy, retain_graph=True)[0] for out in (y, expected))
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    try:
        for memory_format in (torch.contiguous_format, CHANNELS_LAST):
            x = torch.randn(3, 70, 19, 23).contiguous(memory_format=memory_format).requires_grad_()
            results = []
            for count in (1, threads):
                torch.set_num_threads(count)
                y = ops.local_response_norm(x, 5, 1.0)
                results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
            for a, b in zip(*results, strict=True):
                assert_same_bits(a, b)
    finally:
        torch.set_num_threads(before)


def test_arguments_as_torch_takes_them():
    x = torch.randn(2, 6, 3)
    for size in (5, np.int64(5), torch.tensor(5)):
        for number in (1, np.float32(1), True):
            y = ops.local_response_norm(x, size, number, number, number)
            torch.testing.assert_close(y, F.local_response_norm(x, 5, 1.0, 1.0, 1.0))
    weight = torch.tensor(0.5, requires_grad=True)
    assert torch.autograd.grad(ops.local_response_norm(x, 5, weight).sum(), weight)[0] != 0
    assert ops.local_response_norm(x, 5, k=1j).dtype == torch.complex64
    torch.testing.assert_close(
        ops.local_response_norm(x, 5, beta=float("inf")), F.local_response_norm(x, 5, beta=float("inf"))
    )
    assert ops.local_response_norm(torch.empty(2, 3, 4, 4, dtype=torch.float16, device="meta"), 3).shape == (2, 3, 4, 4)
    whole = torch.arange(24).reshape(1, 4, 6)
    torch.testing.assert_close(ops.local_response_norm(whole, 3), F.local_response_norm(whole, 3))


def test_the_module_is_a_drop_in():
    torch.manual_seed(3)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.LocalResponseNorm(5, 0.1, 0.75, 2.0))
    x = torch.randn(2, 3, 9, 9)
    expected = plain(x)
    report = pydl.accelerate(plain)
    assert any(row.replaced and row.kind == "LocalResponseNorm" for row in report)
    with pydl.trace() as trace:
        torch.testing.assert_close(plain(x), expected)
    assert [record.backend for record in trace if record.op == OP] == ["cpu"]


# errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(input=torch.zeros(8, 8)), [OP, "input", "[8, 8]"]),
        (dict(size=0), [OP, "size", "0"]),
        (dict(size=-3), [OP, "size", "-3"]),
        (dict(size=2.0), [OP, "size", "2.0"]),
        (dict(size="5"), [OP, "size", "'5'"]),
        (dict(size=True), [OP, "size", "True"]),
        (dict(alpha="1"), [OP, "alpha", "'1'"]),
        (dict(beta=None), [OP, "beta", "None"]),
        (dict(k="1"), [OP, "k", "'1'"]),
    ],
    ids=lambda v: ",".join(v),
)
def test_errors_are_torchs(arguments, says):
    arguments = {"input": torch.zeros(1, 2, 4, 4), "size": 5, **arguments}
    check_same_error(ops.local_response_norm, F.local_response_norm, says=says, **arguments)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"local_response_norm.*input.*list"):
        ops.local_response_norm([1.0], 5)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    namespace = NAMESPACES[backend.name]
    x = torch.zeros(2, 4, 3, 3, device=backend.device)
    with backend.use():
        for call in (
            lambda: namespace.local_response_norm_fwd(x, 0, 1.0, 0.75, 1.0),
            lambda: namespace.local_response_norm_fwd(x.long(), 5, 1.0, 0.75, 1.0),
            lambda: namespace.local_response_norm_fwd(x.flatten(), 5, 1.0, 0.75, 1.0),
            lambda: namespace.local_response_norm_bwd(x[:1], x, 5, 1.0, 0.75, 1.0),
            lambda: namespace.local_response_norm_bwd(x.double(), x, 5, 1.0, 0.75, 1.0),
            lambda: namespace.local_response_norm_bwd(x, x, -1, 1.0, 0.75, 1.0),
        ):
            with pytest.raises(RuntimeError):
                call()
        # a size of any magnitude is cut to the channels there are
        y = namespace.local_response_norm_fwd(x + 1, 2**62, 1.0, 0.75, 1.0)
        assert y.isfinite().all()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(OP) if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        for memory_format in (torch.contiguous_format, CHANNELS_LAST):
            x = torch.randn(2, 4, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
            check_opcheck(namespace.local_response_norm_fwd.default, x, 3, 1.0, 0.75, 1.0)
            dy = torch.randn(2, 4, 3, 3, requires_grad=True)
            check_opcheck(namespace.local_response_norm_bwd.default, dy, x, 3, 1.0, 0.75, 1.0)


@pytest.mark.compile
def test_compile():
    def fn(x):
        return ops.local_response_norm(x, 5, 0.5) * 2

    for memory_format in (torch.contiguous_format, CHANNELS_LAST):
        shapes = [(2, 3, 8, 8), (1, 6, 5, 4)]
        check_compile(fn, [[torch.randn(s).contiguous(memory_format=memory_format)] for s in shapes])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    for shape in ((2, 5, 6), (2, 5, 3, 3)):
        x = torch.randn(shape, device=backend.device)
        for given in (x, x.bfloat16(), x.half()):
            check_autocast(backend, F.local_response_norm, given, 5, device=backend.device, low=torch.bfloat16)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_deterministic(backend):
    check_deterministic(lambda t: backend(t, 5, 1.0), torch.randn(2, 12, 7, 5, device=backend.device))


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN, reason="starts the sanitized process itself")
def test_values_under_the_sanitizers():
    build_simt_library(sanitize=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", "simt and (test_sanitized or test_raw)", str(Path(__file__))]
    environment = dict(sanitizer_environment(halt=True), PYDL_TEST_SIMT_ASAN="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


def test_sanitized_shapes_of_the_simt_runner():
    load_simt_library()
    simt = torch.ops.pydl_simt
    # both layouts, ends of tiles in both directions, a window for the wide kernels, two widths of elements
    for shape, size in (((2, 5, 3, 11), 5), ((1, 33, 1, 3), 4), ((9, 130, 1, 1), 5), ((1, 50, 2, 2), 40)):
        for dtype in (torch.float32, torch.float16):
            for memory_format in (torch.contiguous_format, CHANNELS_LAST):
                x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
                y = simt.local_response_norm_fwd(x, size, 1.0, 0.75, 1.0)
                dx = simt.local_response_norm_bwd(dy, x, size, 1.0, 0.75, 1.0)
                arrays = [t.double().numpy() for t in (dy, x)]
                assert grade(y, local_response_norm(arrays[1], size, 1.0), dtype=dtype).ok
                wanted = local_response_norm_grad(*arrays, size, 1.0)[0]
                assert grade(dx, wanted, dtype=dtype, gradient=True, reduction=size).ok
