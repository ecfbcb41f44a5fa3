"""The CUDA sources of batch normalisation, run by the SIMT host runner: every kernel variant, also when sanitized."""

from __future__ import annotations

import pytest
import torch
from _simt import UNDER_ASAN, check_sanitized, drawn, load_simt_library

from pydl.ops.batch_norm import torch_batch_norm_act

DTYPES = [torch.float32, torch.float16, torch.float64]
if UNDER_ASAN:  # about ten times slower; bf16 has fp16's addresses
    DTYPES = [torch.float32, torch.float16]
LAST = torch.channels_last
# (shape, memory format, elements before the first): packs of 8 in planes and in rows; sizes that leave a tail; single
# channels; several splits of a channel, as packs and as single elements; rows wider than a block's; misaligned memory.
INPUTS = [
    ((2, 3, 4, 6), torch.contiguous_format, 0),
    ((2, 3, 3, 5), torch.contiguous_format, 0),
    ((3, 1, 5, 3), torch.contiguous_format, 0),
    ((2, 16, 3, 2), LAST, 0),
    ((3, 5, 3, 3), LAST, 0),
    ((5, 24), torch.contiguous_format, 0),
    ((5, 33), torch.contiguous_format, 0),
    ((2, 1, 90, 56), torch.contiguous_format, 0),
    ((1, 2, 41, 31), torch.contiguous_format, 0),
    ((160, 8, 5, 2), LAST, 0),
    ((150, 3, 5, 3), LAST, 0),
    ((3, 272), torch.contiguous_format, 0),
    ((2, 3, 4, 4), torch.contiguous_format, 1),
]


@pytest.fixture(scope="module", autouse=True)
def simt():
    load_simt_library()
    return torch.ops.pydl_simt


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_values_and_gradients(simt, given, relu, dtype):
    shape = given[0]
    x, residual, dy = (drawn(*given, dtype, seed) for seed in range(3))
    dy = dy - 2
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (1 + 0.3 * torch.randn(2, shape[1])).to(compute)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    close = {"rtol": 4e-3, "atol": 4e-3} if dtype == torch.float16 else close
    by_channel = x.double().transpose(0, 1).flatten(1)
    mean, var = by_channel.mean(1).to(compute), by_channel.var(1, correction=0).to(compute)
    for training in (True, False):
        leaves = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
        tail = {"residual": leaves[3], "activation": "relu" if relu else None}
        running = (None, None) if training else (mean.double(), var.double())
        expected = torch_batch_norm_act(leaves[0], *running, *leaves[1:3], training, **tail)
        if training:
            y, *found, mask = simt.batch_norm_train(x, weight, bias, residual, relu, 1e-5)
            for got, wanted in zip(found, (mean, var), strict=True):
                torch.testing.assert_close(got, wanted, **({} if dtype == torch.float16 else close))
        else:
            y, mask = simt.batch_norm_eval(x, mean, var, weight, bias, residual, relu, 1e-5, True)
        assert y.stride() == x.stride()
        torch.testing.assert_close(y.double(), expected, **close)
        kept = mask if relu else None
        output_mask = [True, True, True, relu]
        results = simt.batch_norm_bwd(dy, x, mean, var, weight, kept, training, 1e-5, output_mask)
        wanted = torch.autograd.grad(expected, leaves, dy.double())
        for got, exact in zip(results[: 3 + relu], wanted, strict=False):
            torch.testing.assert_close(got.double(), exact, rtol=close["rtol"], atol=20 * close["atol"])


@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_values_of_statistics_that_processes_share(simt, given):
    x, dy = (drawn(*given, torch.float32, seed) for seed in range(2))
    mean, var = simt.batch_norm_stats(x)
    by_channel = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), by_channel.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), by_channel.var(1, correction=0), rtol=1e-5, atol=1e-6)
    expected, *sums, _ = simt.batch_norm_bwd(dy, x, mean, var, None, None, True, 1e-5, [True, True, True, False])
    averages = [s.double() / by_channel.shape[1] for s in sums]
    dx = simt.batch_norm_dx(dy, x, mean, var, None, *averages, 1e-5)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)
    running = torch.zeros(2, x.shape[1] + 1)[:, 1:]
    simt.batch_norm_update(*running, mean, var, 0.25, 2.0)
    torch.testing.assert_close(running, torch.stack([mean / 4, var / 2]))


def test_values_of_float64_statistics_beside_float32_values(simt):
    # a mean that float32 cannot hold: half a unit in its last place is 5e-4, over a deviation of 1e-2
    mean = torch.tensor([1e4 + 4e-4, 3.0], dtype=torch.float64)
    x = (mean.view(1, 2, 1) + 0.01 * torch.randn(4, 2, 8)).float()
    y, _ = simt.batch_norm_eval(x, mean, torch.full_like(mean, 1e-4), None, None, None, False, 0.0, False)
    torch.testing.assert_close(y.double(), (x.double() - mean.view(1, 2, 1)) * 100, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(UNDER_ASAN, reason="starts the sanitized process itself")
def test_all_of_the_above_under_the_sanitizers():
    check_sanitized(__file__)
