"""attention on every backend: values and gradients of every mask alone, in pairs, and of every broadcast shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from _attention import KINDS, TORCH, check, every_op, kinds_of, tensors
from _backends import backends_and_dtypes, backends_for
from _checks import (
    check_cases,
    check_gradcheck,
    check_layouts,
)

from pydl.reference.attention import cases, sdpa_cases

# values and gradients


@pytest.mark.parametrize(("backend", "dtype"), every_op(backends_and_dtypes))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), every_op(backends_and_dtypes))
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients")


@pytest.mark.parametrize(("backend", "dtype"), every_op(lambda op: backends_and_dtypes(op, without=TORCH)))
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize(("backend", "dtype"), every_op(lambda op: backends_and_dtypes(op, without=TORCH)))
def test_layouts(backend, dtype):
    case = next(c for c in (cases() if backend.op == "attention" else sdpa_cases()) if c.layouts)
    check_layouts(backend, dtype, case)


@pytest.mark.parametrize("backend", backends_for("attention", torch.float64, without=("triton",)))
def test_gradcheck(backend):
    """Output and logsumexp, with a bias and an empty row; two heads share one of k and v."""
    q, k, v = tensors(1, 2, 1, 3, 4, 2, 3, torch.float64)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)

    def function(q, k, v, bias):
        out, lse = backend(q, k, v, bias=bias, mask=mask, softcap=2.0, return_lse=True)
        return out, lse[:, :, ::2]

    check_gradcheck(function, [q, k, v, bias])


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_lengths_around_a_tile(backend, kind):
    """1, 3: less than any tile; 63 to 65: one tile of keys; 127 to 129: one tile of queries; Sq != Sk both ways."""
    lengths = [(1, 1), (3, 65), (64, 63), (65, 127), (129, 64), (127, 129)]
    for sq, sk in lengths if not backend.slow else lengths[:: 1 if kind in ("mask", "bias") else 2]:
        q, k, v = tensors(2, 2, 1, sq, sk, 8, 8, device=backend.device)
        check(backend, q, k, v, **kinds_of([kind], 2, 2, sq, sk))


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("pair", list(itertools.combinations(KINDS, 2)), ids="+".join)
def test_every_pair_of_kinds(backend, pair):
    q, k, v = tensors(2, 2, 2, 65, 70, 8, 8, device=backend.device)
    check(backend, q, k, v, **kinds_of(pair, 2, 2, 65, 70))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("attention", without=TORCH))
@pytest.mark.parametrize("d", [1, 16, 40, 64, 80, 128, 256])
def test_head_dimensions(backend, dtype, d):
    if backend.slow and (d in (40, 80) or dtype in (torch.float64, torch.float16)):
        pytest.skip("padding and dtypes are covered by the other sizes")
    q, k, v = tensors(1, 2, 1, 70, 67, d, max(1, d - 3), dtype, backend.device)
    check(backend, q, k, v, causal="bottom_right", mask=torch.rand(70, 67) < 0.8)


NAMED = {
    "causal 705": (705, 705, {"causal": "top_left"}),
    "window 1025": (1025, 1025, {"window": (100, 0)}),
    "documents 768": (768, 768, {"segment_ids": torch.arange(768).unsqueeze(0) // 200, "causal": "top_left"}),
    "lengths 704": (100, 704, {"key_lengths": torch.tensor([650])}),
    "prefix 720": (720, 720, {"causal": "bottom_right", "prefix_length": 300}),
    "tiles of a mask 832": (832, 832, {"mask": torch.ones(13, 13).tril().bool().kron(torch.ones(64, 64).bool())}),
}  # fmt: skip


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("name", NAMED)
def test_several_tiles(backend, name):
    sq, sk, kinds = NAMED[name]
    q, k, v = tensors(1, 1, 1, sq, sk, 16, 16, device=backend.device)
    check(backend, q, k, v, **kinds)


# the bias and its gradient


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 66), (1, 67))), ids=str)
def test_gradient_of_every_broadcast_shape(backend, shape):
    q, k, v = tensors(2, 4, 2, 66, 67, 8, 8, device=backend.device)
    check(backend, q, k, v, bias=torch.randn(shape), causal="bottom_right")


@pytest.mark.parametrize("backend", backends_for("attention", torch.float32, without=TORCH))
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 66), (1, 67))), ids=str)
def test_masks_of_every_broadcast_shape(backend, shape):
    q, k, v = tensors(2, 4, 2, 66, 67, 8, 8, device=backend.device)
    mask = torch.rand(shape) < 0.6
    expected = backend(q, k, v, mask=mask.expand(2, 4, 66, 67).to(q.device))
    torch.testing.assert_close(backend(q, k, v, mask=mask.to(q.device)), expected, rtol=1e-5, atol=1e-5)
