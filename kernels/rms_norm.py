"""RMS normalisation over the last dimensions: launchers.

Zhang and Sennrich, "Root mean square layer normalization" (2019). Tiles are layer normalisation's, which hold more;
sums are fp32 for every dtype. Few wide rows are cut into pieces, see _layer_norm_split.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._aot import Case
from ._launch import Device, cdiv, device_facts, device_guard, require_dtype
from ._layer_norm_bwd import _layer_norm_bwd_reduce_kernel
from ._norm_rows import (
    LOOPED_BLOCK_N,
    SPLIT_PROGRAMS,
    Config,
    Split,
    as_rows,
    bwd_config,
    check_rows,
    contiguous_parameter,
    dwdb_config,
    fwd_config,
    num_partials,
    num_row_splits,
    reduce_config,
    row_split,
)
from ._rms_norm import (
    _rms_norm_bwd_dw_kernel,
    _rms_norm_bwd_dx_kernel,
    _rms_norm_bwd_dx_looped_kernel,
    _rms_norm_bwd_kernel,
    _rms_norm_fwd_kernel,
    _rms_norm_fwd_looped_kernel,
)
from ._rms_norm_split import (
    _rms_norm_bwd_split_dx_kernel,
    _rms_norm_bwd_split_sums_kernel,
    _rms_norm_fwd_split_kernel,
    _rms_norm_fwd_split_squares_kernel,
)


def rms_norm_fwd(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise the last ``len(normalized_shape)`` dimensions of ``x``.

    Args:
        x: [..., *normalized_shape], float32, float16 or bfloat16, any strides.
        normalized_shape: the trailing shape.
        weight: normalized_shape, ``x``'s dtype or float32.
        eps: added to the mean square.

    Returns:
        y (contiguous, ``x``'s shape and dtype) and rstd (float32, the leading shape).
    """
    require_dtype("rms_norm_fwd", x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[: x.dim() - len(normalized_shape)], dtype=torch.float32, device=x.device)
    M, N = rstd.numel(), math.prod(normalized_shape)
    if M == 0 or N == 0:
        return y, rstd.fill_(math.nan)
    check_rows("rms_norm_fwd", x, M, N)
    x, stride_xm = as_rows(x, M, N)
    weight = contiguous_parameter("rms_norm_fwd", "weight", weight, N)
    itemsize = max(x.element_size(), 0 if weight is None else weight.element_size())
    config, split = fwd_config(M, N, itemsize, device_facts(x)), row_split(M, N)
    with device_guard(x):
        if split:
            _launch_fwd_split(x, weight, y, rstd, M, N, stride_xm, eps, split)
        elif config.looped:
            _rms_norm_fwd_looped_kernel[(M,)](
                x, weight, y, rstd, N, stride_xm, eps, HAS_WEIGHT=weight is not None, BLOCK_N=config.block_n,
                num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            _rms_norm_fwd_kernel[(cdiv(M, config.block_m),)](
                x, weight, y, rstd, M, N, stride_xm, eps, HAS_WEIGHT=weight is not None, BLOCK_M=config.block_m,
                BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    return y, rstd


def _launch_fwd_split(
    x: Tensor, weight: Tensor | None, y: Tensor, rstd: Tensor, M: int, N: int, stride_xm: int, eps: float, split: Split
) -> None:
    parts = x.new_empty((M, split.pieces), dtype=torch.float32)
    _rms_norm_fwd_split_squares_kernel[(split.pieces, M)](
        x, parts, N, split.piece, stride_xm, BLOCK_N=LOOPED_BLOCK_N, num_warps=8, num_stages=1, enable_fp_fusion=True
    )
    _rms_norm_fwd_split_kernel[(split.pieces, M)](
        x, weight, parts, y, rstd, N, split.piece, stride_xm, eps, HAS_WEIGHT=weight is not None,
        BLOCK_N=LOOPED_BLOCK_N, BLOCK_S=SPLIT_PROGRAMS, num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm_fwd`.

    Args:
        dy: gradient of y, any strides.
        x, normalized_shape, weight: the forward's.
        rstd: the forward's result.
        output_mask: which of dx and dweight to compute.

    Returns:
        dx (contiguous) and dweight (normalized_shape, ``weight``'s dtype or ``x``'s without one); an output that is not
        wanted has shape (0,).
    """
    require_dtype("rms_norm_bwd", x)
    want_dx, want_dw = output_mask
    M, N = rstd.numel(), math.prod(normalized_shape)
    affine = x if weight is None else weight
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_dx else x.new_empty(0)
    dweight = affine.new_empty(normalized_shape) if want_dw else x.new_empty(0)
    if M == 0 or N == 0:
        return dx, dweight.zero_() if want_dw else dweight
    check_rows("rms_norm_bwd", x, M, N)
    check_rows("rms_norm_bwd", dy, M, N)
    x, stride_xm = as_rows(x, M, N)
    dy, stride_dym = as_rows(dy, M, N)
    rstd = rstd.contiguous()
    weight = contiguous_parameter("rms_norm_bwd", "weight", weight, N)
    config, device = bwd_config(N), device_facts(x)
    sizes = (M, N, stride_dym, stride_xm)
    split = row_split(M, N) if want_dx else None
    partial = None
    with device_guard(x):
        if split:
            partial = _launch_bwd_split(dy, x, rstd, weight, dx, dweight if want_dw else None, *sizes, split)
        elif want_dx and want_dw and not config.looped:
            partial = x.new_empty((num_partials(M, config, device), N), dtype=torch.float32)
            _rms_norm_bwd_kernel[(partial.shape[0],)](
                dy, x, rstd, weight, dx, partial, *sizes, HAS_WEIGHT=weight is not None, BLOCK_M=config.block_m,
                BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            if want_dx:
                _launch_dx(dy, x, rstd, weight, dx, *sizes, config)
            if want_dw:
                partial = x.new_empty((num_row_splits(M, N, device), N), dtype=torch.float32)
                _launch_dw(dy, x, rstd, partial, *sizes)
        if partial is not None:
            _launch_reduce(partial, dweight)
    return dx, dweight


def _launch_bwd_split(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor, dweight: Tensor | None,
    M: int, N: int, stride_dym: int, stride_xm: int, split: Split,
) -> Tensor | None:  # fmt: skip
    """dx, and dweight where it is wanted: finished, or as the partial sums that it returns."""
    config = split.config
    parts = x.new_empty((M, split.blocks), dtype=torch.float32)
    partial = None
    if dweight is not None and split.groups > 1:
        dweight = partial = x.new_empty((split.groups, N), dtype=torch.float32)
    _rms_norm_bwd_split_sums_kernel[(split.blocks, split.groups)](
        dy, x, rstd, weight, parts, dweight, M, N, stride_dym, stride_xm, HAS_WEIGHT=weight is not None,
        HAS_DWEIGHT=dweight is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
        num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    _rms_norm_bwd_split_dx_kernel[(split.pieces, M)](
        dy, x, rstd, weight, parts, dx, N, split.blocks, split.piece, stride_dym, stride_xm,
        HAS_WEIGHT=weight is not None, BLOCK_N=LOOPED_BLOCK_N, BLOCK_S=SPLIT_PROGRAMS, num_warps=8, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    return partial


def _launch_dx(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor,
    M: int, N: int, stride_dym: int, stride_xm: int, config: Config,
) -> None:  # fmt: skip
    if config.looped:
        _rms_norm_bwd_dx_looped_kernel[(M,)](
            dy, x, rstd, weight, dx, N, stride_dym, stride_xm, HAS_WEIGHT=weight is not None, BLOCK_N=config.block_n,
            num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _rms_norm_bwd_dx_kernel[(cdiv(M, config.block_m),)](
            dy, x, rstd, weight, dx, M, N, stride_dym, stride_xm, HAS_WEIGHT=weight is not None, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


def _launch_dw(
    dy: Tensor, x: Tensor, rstd: Tensor, partial: Tensor, M: int, N: int, stride_dym: int, stride_xm: int
) -> None:
    config = dwdb_config(N)
    _rms_norm_bwd_dw_kernel[(cdiv(N, config.block_n), partial.shape[0])](
        dy, x, rstd, partial, M, N, stride_dym, stride_xm, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_reduce(partial: Tensor, dweight: Tensor) -> None:
    P, N = partial.shape
    config = reduce_config(N)
    _layer_norm_bwd_reduce_kernel[(cdiv(N, config.block_n), 1)](
        partial, dweight, dweight, P, N, BLOCK_P=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
        num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


# widths at which tiles are compiled: every power of two from the narrowest tile, and one row wider than any
AOT_WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
# both tiles of the sums of cut rows, with partial sums and without
AOT_SPLIT_SHAPES = ((64, 65536), (1, 65536), (64, 2**19), (1, 2**19))


def aot_cases(arch: int) -> Iterator[Case]:
    """Every tile for fp32 and bf16 with weight; fp16, mixed dtypes and no weight at one width.

    Triton compiles a size of 1 into the kernel: those are the cases of one row and of one column.
    """
    for N in AOT_WIDTHS:
        for dtype in ("fp32", "bf16"):
            yield from _aot_width(N, dtype, dtype, arch, quick=dtype == "bf16" and N in (4096, 65536))
    yield from _aot_width(4096, "fp16", "fp16", arch)
    yield from _aot_width(4096, "bf16", "fp32", arch)
    yield from _aot_width(4096, "bf16", None, arch)
    yield from _aot_width(4096, "bf16", "bf16", arch, {"M": 1})
    yield from _aot_width(1, "bf16", "bf16", arch, {"N": 1, "stride_xm": 1, "stride_dym": 1})
    for dtype in ("fp32", "bf16"):
        yield from _aot_split(dtype, dtype, AOT_SPLIT_SHAPES, quick=dtype == "bf16")
    for dtype, parameter in (("fp16", "fp16"), ("bf16", "fp32"), ("bf16", None)):
        yield from _aot_split(dtype, parameter, AOT_SPLIT_SHAPES[:1])


def _aot_arguments(dtype: str, parameter: str | None) -> tuple[dict[str, str], dict[str, object], str]:
    types = dict.fromkeys(("x_ptr", "dy_ptr", "y_ptr", "dx_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("rstd_ptr", "partial_ptr", "parts_ptr"), "*fp32")
    types |= dict.fromkeys(("M", "N", "S", "piece", "stride_xm", "stride_dym"), "i32") | {"eps": "fp32"}
    flags: dict[str, object] = {"HAS_WEIGHT": parameter is not None}
    if parameter is None:
        flags["weight_ptr"] = None
    else:
        types["weight_ptr"] = f"*{parameter}"
    return types, flags, f"x {dtype} " + (f"weight {parameter}" if parameter else "no weight")


def _aot_split(
    dtype: str, parameter: str | None, shapes: Sequence[tuple[int, int]], quick: bool = False
) -> Iterator[Case]:
    types, flags, label = _aot_arguments(dtype, parameter)
    pieces = flags | {"BLOCK_N": LOOPED_BLOCK_N, "BLOCK_S": SPLIT_PROGRAMS}
    for kernel in (_rms_norm_fwd_split_squares_kernel, _rms_norm_fwd_split_kernel, _rms_norm_bwd_split_dx_kernel):
        yield Case(kernel, label, types, pieces, 8, quick)
    for M, N in shapes:
        config, groups = row_split(M, N)[2::2]
        name = f"{M}x{N} {label} tile {config.block_m}x{config.block_n}"
        tile = flags | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n} | ({"M": 1} if M == 1 else {})
        sums = {"dweight_ptr": "*fp32" if groups > 1 else f"*{parameter or dtype}"}
        every = tile | {"HAS_DWEIGHT": True}
        yield Case(_rms_norm_bwd_split_sums_kernel, name, types | sums, every, config.num_warps, quick)
        if M > 1:
            no_sums = tile | {"HAS_DWEIGHT": False, "dweight_ptr": None}
            yield Case(_rms_norm_bwd_split_sums_kernel, f"{name} dx only", types, no_sums, config.num_warps)


def _aot_width(
    N: int, dtype: str, parameter: str | None, arch: int, ones: dict[str, int] | None = None, quick: bool = False
) -> Iterator[Case]:
    types, flags, label = _aot_arguments(dtype, parameter)
    flags |= ones or {}
    label = f"N={N} {label}"
    label += f" {', '.join(ones)} = 1" if ones else ""

    def case(kernel, config: Config) -> Case:
        name = f"{label} tile {config.block_m}x{config.block_n}"
        tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        return Case(kernel, name, types, flags | tile, config.num_warps, quick)

    itemsize = 4 if "fp32" in (dtype, parameter) else 2
    for config in dict.fromkeys(fwd_config(M, N, itemsize, Device(arch, 132)) for M in (2**20, 1)):
        yield case(_rms_norm_fwd_looped_kernel if config.looped else _rms_norm_fwd_kernel, config)
    config = bwd_config(N)
    if config.looped:
        yield case(_rms_norm_bwd_dx_looped_kernel, config)
    else:
        yield case(_rms_norm_bwd_kernel, config)
        yield case(_rms_norm_bwd_dx_kernel, config)
    if N in (1, 4096, 65536):
        yield case(_rms_norm_bwd_dw_kernel, dwdb_config(N))
