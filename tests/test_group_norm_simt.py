"""The CUDA sources of group normalisation, run by the SIMT host runner: every kernel variant, also when sanitized."""

from __future__ import annotations

import pytest
import torch
from _simt import UNDER_ASAN, check_sanitized, drawn, load_simt_library

DTYPES = [torch.float32, torch.float16, torch.float64]
if UNDER_ASAN:  # about ten times slower; bf16 has fp16's addresses
    DTYPES = [torch.float32, torch.float16]
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
# (shape, groups, memory format, elements before the first)
INPUTS = {
    "planes of packs": ((2, 6, 4, 6), 2, CONTIGUOUS, 0),
    "planes with a tail": ((2, 6, 3, 5), 3, CONTIGUOUS, 0),
    "planes of packs, misaligned": ((2, 6, 4, 4), 2, CONTIGUOUS, 1),
    "packs of a group, not of a plane": ((2, 8, 3, 3), 1, CONTIGUOUS, 0),
    "instances": ((2, 5, 5, 3), 5, CONTIGUOUS, 0),
    "one channel": ((3, 1, 5, 3), 1, CONTIGUOUS, 0),
    "rows of one position": ((5, 24), 4, CONTIGUOUS, 0),
    "groups of one value": ((5, 24), 24, CONTIGUOUS, 0),
    "groups wider than a warp": ((3, 72, 3, 1), 2, CONTIGUOUS, 0),
    "more samples than a block has rows": ((19, 35, 2, 1), 7, CONTIGUOUS, 0),
    "a block for a plane, packs": ((1, 2, 72, 64), 2, CONTIGUOUS, 0),  # above 512 packs or elements
    "a block for a plane, elements": ((2, 2, 29, 19), 1, CONTIGUOUS, 0),
    "splits of packs": ((1, 2, 96, 90), 1, CONTIGUOUS, 0),  # above 1024 of either
    "splits of elements": ((1, 2, 41, 31), 1, CONTIGUOUS, 0),
    "channels last, packs": ((2, 16, 3, 2), 4, LAST, 0),
    "channels last, a tail": ((3, 6, 3, 3), 3, LAST, 0),
    "channels last, misaligned": ((2, 16, 3, 2), 2, LAST, 1),
    "channels last, instances": ((2, 5, 3, 3), 5, LAST, 0),
    "channels last, several blocks of packs": ((1, 264, 65, 2), 3, LAST, 0),  # in channels and in rows
    "channels last, several blocks of elements": ((2, 33, 13, 7), 3, LAST, 0),
    "channels last, splits of packs": ((1, 8, 33, 32), 2, LAST, 0),
    "channels last, splits of elements": ((2, 3, 17, 16), 1, LAST, 0),
}
# activation, and whether there is a weight and a bias
TAILS = [(0, True, True), (0, False, False), (1, True, True), (1, False, True), (2, True, True), (2, True, False)]


@pytest.fixture(scope="module", autouse=True)
def simt():
    load_simt_library()
    return torch.ops.pydl_simt


def composed(x, groups, weight, bias, activation, eps):
    """The formula in float64: y, mean and var."""
    split = x.unflatten(1, (groups, -1)).flatten(2)
    var, mean = torch.var_mean(split, 2, correction=0)
    y = ((split - mean.unsqueeze(2)) / (var.unsqueeze(2) + eps).sqrt()).view(x.shape)
    along = (1, -1, *[1] * (x.dim() - 2))
    if weight is not None:
        y = y * weight.view(along)
    if bias is not None:
        y = y + bias.view(along)
    return (y, torch.relu(y), torch.nn.functional.silu(y))[activation], mean, var


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_values_and_gradients(simt, name, tail, dtype):
    shape, groups, memory_format, skipped = INPUTS[name]
    activation, *present = tail
    x, dy = (drawn(shape, memory_format, skipped, dtype, seed) for seed in range(2))
    dy.sub_(2)
    weight, bias = (1 + 0.3 * torch.randn(shape[1]).to(dtype) if there else None for there in present)
    if bias is not None and dtype == torch.float16:
        bias = bias.float()  # parameters have dtypes of their own
    # where a group has one value, its deviation is none and 1 / sqrt(eps) multiplies whatever is left
    eps = 1e-2 if name == "groups of one value" else 1e-5
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    expected, *statistics = composed(leaves[0].contiguous(), groups, *leaves[1:], activation, eps)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    y, mean, var = simt.group_norm_fwd(x, groups, weight, bias, activation, eps)
    for got, wanted in zip((mean, var), statistics, strict=True):
        torch.testing.assert_close(got.double(), wanted, **close)
    half = {"rtol": 4e-3, "atol": 4e-3} if dtype == torch.float16 else close
    assert y.stride() == x.stride()
    torch.testing.assert_close(y.double(), expected, **half)
    results = simt.group_norm_bwd(dy, x, mean, var, weight, bias, groups, activation, eps, [True, *present])
    wanted = torch.autograd.grad(expected, [t for t in leaves if t is not None], dy.double())
    found = [t for t in results if t.numel() > 0]
    assert found[0].stride() == x.stride()
    for got, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=half["rtol"], atol=20 * half["atol"])


@pytest.mark.parametrize("name", INPUTS)
def test_values_do_not_depend_on_the_gradients_that_are_wanted(simt, name):
    shape, groups, memory_format, skipped = INPUTS[name]
    x, dy = (drawn(shape, memory_format, skipped, torch.float32, seed) for seed in range(2))
    weight, bias = 1 + 0.3 * torch.randn(2, shape[1])
    _, mean, var = simt.group_norm_fwd(x, groups, weight, bias, 2, 1e-5)
    every = simt.group_norm_bwd(dy, x, mean, var, weight, bias, groups, 2, 1e-5, [True] * 3)
    for i, whole in enumerate(every):
        mask = [i == k for k in range(3)]
        results = simt.group_norm_bwd(dy, x, mean, var, weight, bias, groups, 2, 1e-5, mask)
        assert [t.numel() > 0 for t in results] == mask
        torch.testing.assert_close(results[i], whole, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN, reason="starts the sanitized process itself")
def test_all_of_the_above_under_the_sanitizers():
    check_sanitized(__file__)
