"""Group and instance normalisation: schemas, derivatives and public functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydl.backend import Family, choose
from pydl.ops._contract import Op, cast, wants
from pydl.ops._group_norm_arguments import check, check_instance, fits
from pydl.ops._group_norm_formulas import ACTIVATIONS, MaybeTensor, bwd_fake, fwd_fake, second_derivative
from pydl.ops.batch_norm import MOST_DIMENSIONS, normalise, update

__all__ = ["group_norm", "instance_norm"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OPS = ("group_norm_fwd", "group_norm_bwd")
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",)}
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": _FLOATS, "cuda": _FLOATS, "simt": _FLOATS}
_FAMILY = Family("group_norm", ops=_OPS, order=_ORDER, dtypes=_DTYPES)
_EVAL_OPS = ("batch_norm_eval", "batch_norm_bwd", "batch_norm_update")
_FAMILY_INSTANCE = Family("instance_norm", ops=(*_OPS, *_EVAL_OPS), order=_ORDER, dtypes=_DTYPES)
_RANK = f"more than {MOST_DIMENSIONS} dimensions are left to torch"


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Normalise groups of channels of each sample: (x - mean) / sqrt(var + eps) * weight + bias, then an activation.

    Args:
        input: [N, C, *], floating point; contiguous, channels_last and channels_last_3d layouts are kept.
        num_groups: into how many groups of neighbouring channels C is divided.
        weight: [C], the input's dtype (float32 is legal beside a half-precision input), or None for 1.
        bias: like weight, or None for 0.
        eps: added to the biased variance before the root.
        activation: None, "relu" or "silu", in the same pass; its backward finds it from the input once more, so that
            nothing is kept for it. In half precision nothing is rounded in between.

    Returns:
        [N, C, *] in the input's dtype and layout. Under CUDA autocast float32, as torch.

    Raises:
        TypeError: an argument of another type.
        ValueError: one value per group, or an unknown activation.
        ZeroDivisionError: num_groups of 0.
        RuntimeError: shapes, dtypes or devices that do not fit together; num_groups that does not divide C.
        NotImplementedError: an input that is not floating point.

    Statistics are float32 (float64 for float64) from deviations around the mean, so a large mean costs no digits, and
    are summed in a fixed order: the same bits on every run. Differentiable at any order. Source: Wu and He, "Group
    normalization", 2018.
    """
    if not fits(input, num_groups, weight, bias, eps):
        num_groups, eps = check("group_norm", input, num_groups, weight, bias, eps)
    if activation not in ACTIVATIONS:
        raise ValueError(f"group_norm: argument 'activation' must be None, 'relu' or 'silu', got {activation!r}")
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()
        weight, bias = (t if t is None else t.float() for t in (weight, bias))
    decision = choose(_FAMILY, input, "" if input.dim() <= MOST_DIMENSIONS else _RANK)
    if decision.backend == "torch":
        return torch_group_norm(input, num_groups, weight, bias, eps, activation=activation)
    y: Tensor = _fwd(decision, input, num_groups, weight, bias, ACTIVATIONS[activation], eps)[0]
    return y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel of each sample over its positions: (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        input: [N, C, *], floating point; contiguous, channels_last and channels_last_3d layouts are kept.
        running_mean: [C], the input's dtype (float32 is legal beside a half-precision input), or None; needed without
            input statistics.
        running_var: like running_mean; both or none of the two.
        weight: [C], the input's dtype (float32 beside half precision), or None for 1.
        bias: like weight, or None for 0.
        use_input_stats: whether the input's own statistics are used, and the running ones, if given, updated in place
            by their average over the batch; else the running ones are used.
        momentum: weight of the batch in the running statistics.
        eps: added to the biased variance before the root.

    Returns:
        [N, C, *] in the input's dtype and layout.

    Raises:
        TypeError: an argument of another type.
        ValueError: one position per instance, or one of the running statistics without the other.
        IndexError: fewer than two dimensions.
        RuntimeError: shapes, dtypes or devices that do not fit together; no running statistics where they are needed.
        NotImplementedError: an input that is not floating point.

    As :func:`group_norm` with one channel per group. The running variance averages the unbiased variances. An empty
    batch leaves the running statistics alone. Source: Ulyanov, Vedaldi, Lempitsky, "Instance normalization", 2016.
    """
    momentum, eps = check_instance(
        "instance_norm", input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
    decision = choose(_FAMILY_INSTANCE, input, "" if input.dim() <= MOST_DIMENSIONS else _RANK)
    if decision.backend == "torch":
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        assert running_mean is not None and running_var is not None
        keep = wants((input, weight, bias))
        if keep:  # a training step before the backward would change them
            running_mean, running_var = running_mean.clone(), running_var.clone()
        return normalise(decision, input, running_mean, running_var, weight, bias, None, False, eps, keep)  # type: ignore[no-any-return]
    y: Tensor
    y, mean, var = _fwd(decision, input, input.shape[1], weight, bias, 0, eps)
    if running_mean is not None and input.numel():
        positions = input.numel() // (input.shape[0] * input.shape[1])
        averages = mean.detach().mean(0), var.detach().mean(0)
        # straight to the operator: there is no derivative to keep out
        update.overload(decision)(running_mean, running_var, *averages, momentum, positions / (positions - 1))
    return y


def torch_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """:func:`group_norm` composed of torch's operations."""
    y = F.group_norm(input, num_groups, weight, bias, eps)
    if activation == "relu":
        return torch.relu(y)
    return F.silu(y) if activation == "silu" else y


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, groups, weight, bias, activation, eps = inputs
    _, mean, var = outputs
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias if activation else None, mean, var)
    ctx.groups, ctx.activation, ctx.eps = groups, activation, eps
    ctx.bias_dtype = None if bias is None else bias.dtype


def _fwd_backward(ctx: Any, dy: MaybeTensor, *_: MaybeTensor) -> tuple[MaybeTensor, ...]:
    if dy is None:
        return (None,) * 6
    x, weight, bias, mean, var = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    dx, dweight, dbias = _bwd(ctx.decision, dy, x, mean, var, weight, bias, ctx.groups, ctx.activation, ctx.eps, wanted)
    return (
        dx if wanted[0] else None,
        None,
        cast(dweight, weight.dtype) if wanted[1] else None,
        cast(dbias, ctx.bias_dtype) if wanted[2] else None,
        None,
        None,
    )


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    dy, x, _, _, weight, bias, groups, activation, eps, _ = inputs
    ctx.save_for_backward(dy, x, weight, bias)
    ctx.groups, ctx.activation, ctx.eps = groups, activation, eps


def _bwd_backward(ctx: Any, *cotangents: MaybeTensor) -> tuple[MaybeTensor, ...]:
    given = [None if t is None or not t.numel() else t for t in cotangents]
    gradients = second_derivative(ctx.saved_tensors, ctx.groups, ctx.activation, ctx.eps, given)
    return (*gradients, None, None, None, None)


_fwd = Op(
    "group_norm_fwd",
    "(Tensor x, SymInt groups, Tensor? weight, Tensor? bias, int activation, float eps) -> (Tensor, Tensor, Tensor)",
    fake=fwd_fake,
    setup=_fwd_setup,
    backward=_fwd_backward,
)
_bwd = Op(
    "group_norm_bwd",
    "(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, SymInt groups, int activation,"
    " float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    fake=bwd_fake,
    setup=_bwd_setup,
    backward=_bwd_backward,
)
