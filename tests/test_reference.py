"""The oracles themselves: checked against torch in float64, so that everything else may be checked against them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pydl import reference
from pydl._verify import torch_function
from pydl.reference.layer_norm import layer_norm, layer_norm_stats
from pydl.reference.max_pool import max_pool, max_pool_grad, output_size

SPECS = reference.specs()
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS.values()
    if spec.torch_name
    for case in spec.cases()
]
# where the oracle is finite and torch's gradient is not, because of a difference of two infinities
# x ** inf is 0 or infinite: neither has a gradient, and what torch's own chain gives for it means nothing; the backward
# of torch's group norm raises for a bias without a weight, and gives NaN where there are no positions
NO_GRADIENT = {(f"lp_pool{n}d", "infinity") for n in (1, 2, 3)}
NO_GRADIENT |= {("group_norm", "bias only"), ("group_norm", "no positions")}
TORCH_IS_NAN = {("ctc_loss", "impossible class"), ("ctc_loss_from_logits", "impossible class")}


def run_torch(spec, case):
    every = [torch.from_numpy(a.copy()) for a in case.arrays]
    tensors = [t.requires_grad_() for t, varies in zip(every, spec.varies(case), strict=True) if varies]
    args, kwargs = case.replace(every)
    return tensors, torch_function(spec)(*args, **kwargs)


GRADED = [p for p in CASES if p.values[0].gradient and (p.values[0].name, p.values[1].name) not in NO_GRADIENT]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_values_equal_torch_in_float64(spec, case):
    _, expected = run_torch(spec, case)
    got = spec.forward(*case.args, **case.kwargs)
    got, expected = (got, expected) if isinstance(got, tuple) else ((got,), (expected,))
    for ours, theirs in zip(got, expected, strict=True):
        # 1e-11: float64 rounding of sums of up to 9,001 terms; the mean-1e4 rows lose three more digits
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("spec", "case"), GRADED)
def test_gradients_equal_torch_in_float64(spec, case):
    tensors, out = run_torch(spec, case)
    out = out[0] if isinstance(out, tuple) else out
    dy = np.random.default_rng(1).standard_normal(out.shape)
    expected = torch.autograd.grad(out, tensors, torch.from_numpy(dy))
    got = spec.gradient(dy, *case.args, **case.kwargs)
    assert len(got) == len(tensors)
    for ours, theirs in zip(got, expected, strict=True):
        if (spec.name, case.name) in TORCH_IS_NAN:
            assert not np.isnan(ours).any()
            theirs = torch.where(theirs.isnan(), torch.from_numpy(ours), theirs)
        scale = max(1.0, float(np.abs(np.nan_to_num(ours, posinf=0, neginf=0)).max(initial=0.0)))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-9, atol=1e-10 * scale, equal_nan=True)


def test_layer_norm_of_a_row_by_hand():
    # mean 2, variance (1 + 0 + 1) / 3
    x = np.array([[1.0, 2.0, 3.0]])
    r = 1.0 / math.sqrt(2.0 / 3.0 + 1e-5)
    np.testing.assert_allclose(
        layer_norm(x, (3,), np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0])), [[-r, 1.0, 3 * r]]
    )
    mean, rstd = layer_norm_stats(x, (3,))
    assert mean.item() == 2.0 and rstd.item() == pytest.approx(r)


def test_layer_norm_refuses_another_shape():
    with pytest.raises(ValueError, match="does not end in"):
        layer_norm(np.zeros((2, 3)), (2,))


def test_max_pool_first_maximum_and_last_nan_win():
    # torch updates on `value > best or isnan(value)`: equal values keep the first tap, a second NaN replaces the first
    y, indices = max_pool(2, np.array([[5.0, 1.0], [5.0, 2.0]]), 2)
    assert (y.item(), indices.item()) == (5.0, 0)
    y, indices = max_pool(2, np.array([[5.0, np.nan], [np.nan, 9.0]]), 2)
    assert np.isnan(y.item()) and indices.item() == 2
    y, indices = max_pool(2, np.full((2, 2), -np.inf), 2)
    assert (y.item(), indices.item()) == (-np.inf, 0)


def test_max_pool_window_without_a_tap_inside_has_no_gradient():
    # H = 1, k = 2, p = 1, d = 2: the rows of the only window are -1 and 1, both outside
    y, indices = max_pool(2, np.ones((1, 4)), 2, 1, 1, 2)
    assert np.all(y == -np.inf) and np.all(indices == -1)
    assert not max_pool_grad(np.ones(y.shape), indices, 1, 4).any()


def test_max_pool_gradient_adds_up_where_windows_share_a_maximum():
    x = np.array([[0.0, 9.0, 0.0]])
    _, indices = max_pool(2, x, (1, 2), 1)
    np.testing.assert_array_equal(max_pool_grad(np.array([[1.0, 2.0]]), indices, 1, 3), [[0.0, 3.0, 0.0]])


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_size_equals_torch_on_a_grid(ceil_mode):
    # all combinations for small sizes, ceil_mode's rule about the last window among them
    for n in range(1, 9):
        for k in (1, 2, 3):
            for s in (1, 2, 3):
                for p in range(k // 2 + 1):
                    for d in (1, 2):
                        ours = output_size(n, k, s, p, d, ceil_mode)
                        if ours < 1:
                            continue
                        x = torch.zeros(1, 1, n, max(8, n))
                        theirs = F.max_pool2d(x, (k, 1), (s, 1), (p, 0), (d, 1), ceil_mode).shape[2]
                        assert ours == theirs, (n, k, s, p, d)


def test_step_counts_the_threshold_as_on():
    from pydl.reference.activations import heaviside_step as step
    from pydl.reference.activations import heaviside_step_grad as step_grad

    x = np.array([-1.0, 0.0, 1.0, np.nan])
    np.testing.assert_array_equal(step(x), [0.0, 1.0, 1.0, 0.0])
    np.testing.assert_array_equal(step(x, 1.0), [0.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(step_grad(np.ones(4), x), np.zeros(4))


def test_specs_are_found_by_module_and_by_function():
    assert set(reference.specs("activations")) >= {"relu", "gelu", "silu"}
    assert list(reference.specs("gelu")) == ["gelu"]
    with pytest.raises(ValueError, match="op must be one of"):
        reference.specs("no_such_op")
