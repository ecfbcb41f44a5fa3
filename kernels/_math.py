"""Device functions that are exact enough for fp32 results and run compiled as well as interpreted (no libdevice)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32, with the exponential of a number <= 0 so that nothing overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def sigmoid_and_slope(x):
    """sigmoid(x) and its derivative e / (1 + e)^2, which p (1 - p) would lose to cancellation for large x."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x >= 0.0, 1.0, e) * r, e * r * r


@triton.jit
def tanh(x):
    """Hyperbolic tangent of fp32, within 2 ulp.

    Below 5/8 an odd polynomial x + x z P(z), z = x^2, with P the weighted least-squares fit of degree 4 on Chebyshev
    nodes (1.3 half ulps); above, (1 - e) / (1 + e) with e = exp(-2 |x|), which would cancel near zero.
    """
    a = tl.abs(x)
    z = x * x
    p = -0.005704042501747608
    p = p * z + 0.020637862384319305
    p = p * z - 0.05373915657401085
    p = p * z + 0.133314311504364
    p = p * z - 0.3333328068256378
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(a < 0.625, x + x * (z * p), large)
