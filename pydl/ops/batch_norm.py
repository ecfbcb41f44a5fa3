"""Batch normalisation, alone and with an addition and relu behind it: schemas, derivatives and public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydl.backend import Decision, Family, choose
from pydl.ops._batch_norm_arguments import check, check_residual, fits
from pydl.ops._batch_norm_formulas import (
    MaybeTensor,
    bwd_fake,
    dx_fake,
    eval_fake,
    second_derivative,
    stats_fake,
    train_fake,
    update_fake,
)
from pydl.ops._contract import Op, cast, wants

__all__ = ["batch_norm", "batch_norm_act"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OPS = ("batch_norm_train", "batch_norm_eval", "batch_norm_bwd", "batch_norm_update")
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",)}
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": _FLOATS, "cuda": _FLOATS, "simt": _FLOATS}
_FAMILY = Family("batch_norm", ops=_OPS, order=_ORDER, dtypes=_DTYPES)
_FAMILY_ACT = Family("batch_norm_act", ops=_OPS, order=_ORDER, dtypes=_DTYPES)
SYNC_FAMILY = Family("sync_batch_norm", ops=(*_OPS, "batch_norm_stats", "batch_norm_dx"), order=_ORDER, dtypes=_DTYPES)
MOST_DIMENSIONS = 16
_RANK = f"fewer than 2 and more than {MOST_DIMENSIONS} dimensions are left to torch"


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    biased_running_var: bool = False,
) -> Tensor:
    """Normalise each channel over the batch and all positions: (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        input: [N, C, *], floating point; contiguous, channels_last and channels_last_3d layouts are kept.
        running_mean: [C], the input's dtype (float32 beside a half-precision input), or None; needed for evaluation.
        running_var: like running_mean; both or none of the two.
        weight: [C], same dtype as running_mean, or None for 1.
        bias: like weight, or None for 0.
        training: whether the batch's own statistics are used, and the running ones, if given, updated in place.
        momentum: weight of the batch in the running statistics.
        eps: added to the biased variance before the root.
        biased_running_var: whether the running variance averages the biased variance of the batch, as it is used in the
            normalisation, instead of torch's unbiased one (n / (n - 1) of it).

    Returns:
        [N, C, *] in the input's dtype and layout.

    Raises:
        TypeError: an argument of another type.
        ValueError: one value per channel in training, one of the running statistics without the other, eps <= 0.
        RuntimeError: shapes, dtypes or devices that do not fit together; no running statistics in evaluation.
        NotImplementedError: an input that is not floating point.

    Statistics are float32 (float64 for float64) from deviations around the mean, so a large mean costs no digits, and
    are summed in a fixed order: the same bits on every run. Differentiable at any order. An empty batch leaves the
    running statistics alone. Source: Ioffe and Szegedy, "Batch normalization", 2015.
    """
    if not fits(input, running_mean, running_var, weight, bias, training, momentum, eps):
        weight, bias, momentum, eps = check(
            "batch_norm", "input", input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    decision = choose(_FAMILY, input, "" if 2 <= input.dim() <= MOST_DIMENSIONS else _RANK)
    return _run(
        decision,
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        None,
        False,
        biased_running_var,
    )


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    biased_running_var: bool = False,
) -> Tensor:
    """Batch normalisation, then the addition of a residual, then an activation, in one pass over memory.

    Args:
        x: [N, C, *], floating point; contiguous, channels_last and channels_last_3d layouts are kept.
        running_mean: [C] or None, as for :func:`batch_norm`.
        running_var: [C] or None.
        weight: [C] or None.
        bias: [C] or None.
        training: as for :func:`batch_norm`.
        momentum: weight of the batch in the running statistics.
        eps: added to the biased variance before the root.
        residual: x's shape and dtype, added to the normalised x; or None.
        activation: None, or "relu" after the addition.
        biased_running_var: as for :func:`batch_norm`.

    Returns:
        [N, C, *] in x's dtype and layout.

    Raises:
        TypeError: an argument of another type.
        ValueError: as for :func:`batch_norm`, or an unknown activation.
        RuntimeError: as for :func:`batch_norm`, or a residual of another shape, dtype or device.
        NotImplementedError: an input that is not floating point.

    As :func:`batch_norm`; in half precision nothing is rounded between the three steps. For the backward of relu one
    bit per element is kept. Source: Ioffe and Szegedy, "Batch normalization", 2015; He and others, "Deep residual
    learning for image recognition", 2015.
    """
    op = "batch_norm_act"
    if not fits(x, running_mean, running_var, weight, bias, training, momentum, eps):
        weight, bias, momentum, eps = check(
            op, "x", x, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if activation not in (None, "relu"):
        raise ValueError(f"{op}: argument 'activation' must be None or 'relu', got {activation!r}")
    if residual is not None:
        check_residual(op, residual, x)
    decision = choose(_FAMILY_ACT, x, "" if 2 <= x.dim() <= MOST_DIMENSIONS else _RANK)
    return _run(
        decision,
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation == "relu",
        biased_running_var,
    )


def _run(
    decision: Decision,
    x: Tensor,
    running_mean: MaybeTensor,
    running_var: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    training: bool,
    momentum: float,
    eps: float,
    residual: MaybeTensor,
    relu: bool,
    biased: bool,
) -> Tensor:
    if decision.backend == "torch":
        return torch_batch_norm_act(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation="relu" if relu else None,
            biased_running_var=biased,
        )
    if training:
        y, mean, var = _train(decision, x, weight, bias, residual, relu, eps)
        if running_mean is not None and x.numel():
            count = x.numel() // x.shape[1]
            _update_running(decision, running_mean, running_var, mean, var, momentum, count, biased)
        return y
    assert running_mean is not None and running_var is not None
    keep = wants((x, weight, bias, residual))
    if keep:  # a training step before the backward would change them
        running_mean, running_var = running_mean.clone(), running_var.clone()
    return normalise(decision, x, running_mean, running_var, weight, bias, residual, relu, eps, keep)


def torch_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    biased_running_var: bool = False,
) -> Tensor:
    """:func:`batch_norm_act` composed of torch's operations."""
    norm = torch.nn.functional.batch_norm
    if training and biased_running_var and running_mean is not None and running_var is not None and x.numel():
        # a momentum of 1 leaves the batch's own statistics, from which the running ones follow
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        y = norm(x, mean, var, weight, bias, True, 1.0, eps)
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * ((count - 1) / count), momentum)
    else:
        y = norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if activation == "relu" else y


def _update_running(
    decision: Decision,
    running_mean: MaybeTensor,
    running_var: MaybeTensor,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
    biased: bool,
) -> None:
    """Moves the running statistics towards those of a batch of ``count`` values per channel, in place.

    Their version does not change, as with torch: graphs of torch's own batch norm keep them, and need no value of them.
    """
    correction = 1.0 if biased else count / (count - 1)
    # straight to the operator: there is no derivative to keep out
    update.overload(decision)(running_mean, running_var, mean, var, momentum, correction)


def _train_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, relu, eps = inputs
    _, mean, var, mask = outputs
    ctx.mark_non_differentiable(mean, var, mask)
    ctx.save_for_backward(x, weight, mean, var, mask if relu else None)
    ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype


def _train_backward(ctx: Any, dy: MaybeTensor, *_: MaybeTensor) -> tuple[MaybeTensor, ...]:
    if dy is None:
        return (None,) * 6
    x, weight, mean, var, mask = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    return (*_gradients(ctx, dy, x, mean, var, weight, mask, True, wanted), None, None)


def _gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: MaybeTensor,
    mask: MaybeTensor,
    training: bool,
    wanted: list[bool],
) -> tuple[MaybeTensor, ...]:
    """(dx, dweight, dbias, dresidual); without an activation the last is dy itself."""
    residual, output_mask = wanted[3], [*wanted[:3], wanted[3] and mask is not None]
    dx = dweight = dbias = dresidual = None
    if any(output_mask):
        dx, dweight, dbias, dresidual = bwd(
            ctx.decision, dy, x, mean, var, weight, mask, training, ctx.eps, output_mask
        )
    return (
        dx if wanted[0] else None,
        cast(dweight, weight.dtype) if wanted[1] else None,  # type: ignore[union-attr, arg-type]
        cast(dbias, ctx.bias_dtype) if wanted[2] else None,  # type: ignore[arg-type]
        (dy if mask is None else dresidual) if residual else None,
    )


def _eval_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, mean, var, weight, bias, residual, relu, eps, keep = inputs
    ctx.save_for_backward(x, mean, var, weight, bias, residual if relu and not keep else None, outputs[1])
    ctx.eps, ctx.relu, ctx.bias_dtype = eps, relu, None if bias is None else bias.dtype


def _eval_backward(ctx: Any, dy: MaybeTensor) -> tuple[MaybeTensor, ...]:
    if dy is None:
        return (None,) * 9
    x, mean, var, weight, bias, residual, mask = ctx.saved_tensors
    if not ctx.relu:
        mask = None
    elif not mask.numel() and x.numel():  # a direct call of the operator that did not ask for it
        detached = [None if t is None else t.detach() for t in (x, mean, var, weight, bias, residual)]
        _, mask = normalise.overload(ctx.decision)(*detached, True, ctx.eps, True)
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5)]
    dx, dweight, dbias, dresidual = _gradients(ctx, dy, x, mean, var, weight, mask, False, wanted)
    return dx, None, None, dweight, dbias, dresidual, None, None, None


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    dy, x, mean, var, weight, mask, training, eps, _ = inputs
    ctx.save_for_backward(dy, x, mean, var, weight, mask)
    ctx.training, ctx.eps = training, eps


def _bwd_backward(
    ctx: Any, ddx: MaybeTensor, ddweight: MaybeTensor, ddbias: MaybeTensor, ddresidual: MaybeTensor
) -> tuple[MaybeTensor, ...]:
    given = [None if t is None or not t.numel() else t for t in (ddx, ddweight, ddbias, ddresidual)]
    return (*second_derivative(ctx.saved_tensors, ctx.training, ctx.eps, given), None, None, None, None)


_train = Op(
    "batch_norm_train",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=train_fake,
    setup=_train_setup,
    backward=_train_backward,
    hidden=1,
)
normalise = Op(
    "batch_norm_eval",
    "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps,"
    " bool keep) -> (Tensor, Tensor)",
    fake=eval_fake,
    setup=_eval_setup,
    backward=_eval_backward,
    hidden=1,
)
bwd = Op(
    "batch_norm_bwd",
    "(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? mask, bool training, float eps,"
    " bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
update = Op(
    "batch_norm_update",
    "(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor mean, Tensor var, float momentum, float correction)"
    " -> ()",
    fake=update_fake,
)
# for statistics that several processes share: those of one, and dx from sums of all
stats = Op("batch_norm_stats", "(Tensor x) -> (Tensor, Tensor)", fake=stats_fake)
dx_from_sums = Op(
    "batch_norm_dx",
    "(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor dweight, Tensor dbias, float eps) -> Tensor",
    fake=dx_fake,
)
