"""Layer normalisation over the last dimensions: launchers and tile choice.

Ba, Kiros and Hinton, "Layer Normalization" (2016). Forward reads x and writes y; backward reads x and dy once for dx,
dweight and dbias as long as a row fits a tile. Few wider rows are cut into pieces, see _layer_norm_split.py. Statistics
and sums are fp32 for every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._aot import Case
from ._launch import Device, cdiv, device_facts, device_guard, require_dtype
from ._layer_norm_bwd import (
    _layer_norm_bwd_dwdb_kernel,
    _layer_norm_bwd_dx_kernel,
    _layer_norm_bwd_dx_looped_kernel,
    _layer_norm_bwd_kernel,
    _layer_norm_bwd_reduce_kernel,
)
from ._layer_norm_fwd import _layer_norm_fwd_kernel, _layer_norm_fwd_looped_kernel
from ._layer_norm_split import (
    _layer_norm_bwd_split_dx_kernel,
    _layer_norm_bwd_split_sums_kernel,
    _layer_norm_fwd_split_kernel,
    _layer_norm_fwd_split_statistics_kernel,
)
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


def layer_norm_fwd(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the last ``len(normalized_shape)`` dimensions of ``x``.

    Args:
        x: [..., *normalized_shape], float32, float16 or bfloat16, any strides.
        normalized_shape: the trailing shape.
        weight, bias: normalized_shape, ``x``'s dtype or float32.
        eps: added to the biased variance.

    Returns:
        y (contiguous, ``x``'s shape and dtype), mean and rstd (float32, the leading shape).
    """
    require_dtype("layer_norm_fwd", x)
    lead = x.shape[: x.dim() - len(normalized_shape)]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(lead, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    M, N = mean.numel(), math.prod(normalized_shape)
    if M == 0 or N == 0:
        # torch's values for rows without elements
        return y, mean.fill_(0.0), rstd.fill_(math.nan)
    check_rows("layer_norm_fwd", x, M, N)
    x, stride_xm = as_rows(x, M, N)
    weight = contiguous_parameter("layer_norm_fwd", "weight", weight, N)
    bias = contiguous_parameter("layer_norm_fwd", "bias", bias, N)
    has_weight, has_bias = weight is not None, bias is not None
    itemsize = max(x.element_size(), weight.element_size() if has_weight else 0, bias.element_size() if has_bias else 0)
    config, split = fwd_config(M, N, itemsize, device_facts(x)), row_split(M, N)
    with device_guard(x):
        if split:
            _launch_fwd_split(x, weight, bias, y, mean, rstd, M, N, stride_xm, eps, split)
        elif config.looped:
            _layer_norm_fwd_looped_kernel[(M,)](
                x, weight, bias, y, mean, rstd, N, stride_xm, eps, HAS_WEIGHT=has_weight, HAS_BIAS=has_bias,
                BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            _layer_norm_fwd_kernel[(cdiv(M, config.block_m),)](
                x, weight, bias, y, mean, rstd, M, N, stride_xm, eps, HAS_WEIGHT=has_weight, HAS_BIAS=has_bias,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1,
                enable_fp_fusion=True,
            )  # fmt: skip
    return y, mean, rstd


def _launch_fwd_split(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor,
    M: int, N: int, stride_xm: int, eps: float, split: Split,
) -> None:  # fmt: skip
    parts = x.new_empty((3, M, split.pieces), dtype=torch.float32)
    _layer_norm_fwd_split_statistics_kernel[(split.pieces, M)](
        x, parts, N, split.piece, stride_xm, BLOCK_N=LOOPED_BLOCK_N, num_warps=8, num_stages=1, enable_fp_fusion=True
    )
    _layer_norm_fwd_split_kernel[(split.pieces, M)](
        x, weight, bias, parts, y, mean, rstd, N, split.piece, stride_xm, eps, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, BLOCK_N=LOOPED_BLOCK_N, BLOCK_S=SPLIT_PROGRAMS, num_warps=8, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`layer_norm_fwd`.

    Args:
        dy: gradient of y, any strides.
        x, normalized_shape, weight: the forward's.
        mean, rstd: the forward's results.
        output_mask: which of dx, dweight, dbias to compute.

    Returns:
        dx (contiguous), dweight and dbias (normalized_shape, ``weight``'s dtype or ``x``'s without one); an output that
        is not wanted has shape (0,).
    """
    require_dtype("layer_norm_bwd", x)
    want_dx, want_dw, want_db = output_mask
    N = math.prod(normalized_shape)
    M = mean.numel()
    affine = x if weight is None else weight
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_dx else x.new_empty(0)
    dweight = affine.new_empty(normalized_shape) if want_dw else x.new_empty(0)
    dbias = affine.new_empty(normalized_shape) if want_db else x.new_empty(0)
    sums = [(i, out) for i, (out, wanted) in enumerate(((dweight, want_dw), (dbias, want_db))) if wanted]
    if M == 0 or N == 0:
        for _, out in sums:
            out.zero_()
        return dx, dweight, dbias
    check_rows("layer_norm_bwd", x, M, N)
    check_rows("layer_norm_bwd", dy, M, N)
    check_rows("layer_norm_bwd", rstd, M, 1)
    x, stride_xm = as_rows(x, M, N)
    dy, stride_dym = as_rows(dy, M, N)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight = contiguous_parameter("layer_norm_bwd", "weight", weight, N)
    config, device = bwd_config(N), device_facts(x)
    sizes = (M, N, stride_dym, stride_xm)
    split = row_split(M, N) if want_dx else None
    partial = None
    with device_guard(x):
        if split:
            partial = _launch_bwd_split(dy, x, mean, rstd, weight, dx, sums, *sizes, split)
        elif want_dx and sums and not config.looped:
            partial = x.new_empty((2, num_partials(M, config, device), N), dtype=torch.float32)
            _layer_norm_bwd_kernel[(partial.shape[1],)](
                dy, x, mean, rstd, weight, dx, partial, *sizes, HAS_WEIGHT=weight is not None, BLOCK_M=config.block_m,
                BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            if want_dx:
                _launch_dx(dy, x, mean, rstd, weight, dx, *sizes, config)
            if sums:
                partial = x.new_empty((2, num_row_splits(M, N, device), N), dtype=torch.float32)
                _launch_dwdb(dy, x, mean, rstd, partial, *sizes)
        if partial is not None:
            _launch_reduce(partial, sums, N)
    return dx, dweight, dbias


def _launch_bwd_split(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor,
    sums: list[tuple[int, Tensor]], M: int, N: int, stride_dym: int, stride_xm: int, split: Split,
) -> Tensor | None:  # fmt: skip
    """dx, and dweight and dbias: finished, or as the partial sums that it returns."""
    config = split.config
    parts = x.new_empty((M, 2, split.blocks), dtype=torch.float32)
    partial = x.new_empty((2, split.groups, N), dtype=torch.float32) if sums and split.groups > 1 else None
    targets = {i: out if partial is None else partial[i] for i, out in sums}
    _layer_norm_bwd_split_sums_kernel[(split.blocks, split.groups)](
        dy, x, mean, rstd, weight, parts, targets.get(0), targets.get(1), M, N, stride_dym, stride_xm,
        HAS_WEIGHT=weight is not None, HAS_DWEIGHT=0 in targets, HAS_DBIAS=1 in targets, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    _layer_norm_bwd_split_dx_kernel[(split.pieces, M)](
        dy, x, mean, rstd, weight, parts, dx, N, split.blocks, split.piece, stride_dym, stride_xm,
        HAS_WEIGHT=weight is not None, BLOCK_N=LOOPED_BLOCK_N, BLOCK_S=SPLIT_PROGRAMS, num_warps=8, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    return partial


def _launch_dwdb(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, partial: Tensor,
    M: int, N: int, stride_dym: int, stride_xm: int,
) -> None:  # fmt: skip
    config = dwdb_config(N)
    _layer_norm_bwd_dwdb_kernel[(cdiv(N, config.block_n), partial.shape[1])](
        dy, x, mean, rstd, partial, M, N, stride_dym, stride_xm, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_reduce(partial: Tensor, sums: list[tuple[int, Tensor]], N: int) -> None:
    config = reduce_config(N)
    _layer_norm_bwd_reduce_kernel[(cdiv(N, config.block_n), len(sums))](
        partial[sums[0][0]], sums[0][1], sums[-1][1], partial.shape[1], N, BLOCK_P=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_dx(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dx: Tensor,
    M: int, N: int, stride_dym: int, stride_xm: int, config: Config,
) -> None:  # fmt: skip
    if config.looped:
        _layer_norm_bwd_dx_looped_kernel[(M,)](
            dy, x, mean, rstd, weight, dx, N, stride_dym, stride_xm, HAS_WEIGHT=weight is not None,
            BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _layer_norm_bwd_dx_kernel[(cdiv(M, config.block_m),)](
            dy, x, mean, rstd, weight, dx, M, N, stride_dym, stride_xm, HAS_WEIGHT=weight is not None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip


# widths at which tiles are compiled: every power of two from the narrowest tile, and one row wider than any
AOT_WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
# both tiles of the sums of cut rows, with partial sums and without
AOT_SPLIT_SHAPES = ((64, 65536), (1, 65536), (64, 2**19), (1, 2**19))


def aot_cases(arch: int) -> Iterator[Case]:
    """Every tile for fp32 and bf16 with weight and bias; fp16, mixed dtypes and missing parameters at a few widths.

    Triton compiles a size of 1 into the kernel: those are the cases of one row and of one column.
    """
    for N in AOT_WIDTHS:
        for dtype in ("fp32", "bf16"):
            yield from _aot_width(N, dtype, dtype, arch, quick=dtype == "bf16" and N in (4096, 65536))
    for N in (4096, 32768):
        yield from _aot_width(N, "fp16", "fp16", arch)
        yield from _aot_width(N, "bf16", "fp32", arch)
        yield from _aot_width(N, "bf16", None, arch)
    yield from _aot_width(4096, "bf16", "bf16", arch, {"M": 1, "P": 1})
    yield from _aot_width(1, "bf16", "bf16", arch, {"N": 1, "stride_xm": 1, "stride_dym": 1})
    for dtype in ("fp32", "bf16"):
        yield from _aot_split(dtype, dtype, AOT_SPLIT_SHAPES, quick=dtype == "bf16")
    for dtype, parameter in (("fp16", "fp16"), ("bf16", "fp32"), ("bf16", None)):
        yield from _aot_split(dtype, parameter, AOT_SPLIT_SHAPES[:1])


def _aot_arguments(dtype: str, parameter: str | None) -> tuple[dict[str, str], dict[str, object], str]:
    rows = dict.fromkeys(("x_ptr", "dy_ptr", "y_ptr", "dx_ptr"), f"*{dtype}")
    sums = dict.fromkeys(("first_ptr", "second_ptr"), f"*{parameter or dtype}")
    statistics = dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr", "parts_ptr"), "*fp32")
    sizes = dict.fromkeys(("M", "N", "P", "S", "piece", "stride_xm", "stride_dym"), "i32")
    types = rows | sums | statistics | sizes | {"eps": "fp32"}
    flags: dict[str, object] = {"HAS_WEIGHT": parameter is not None, "HAS_BIAS": parameter is not None}
    if parameter is not None:
        types |= dict.fromkeys(("weight_ptr", "bias_ptr"), f"*{parameter}")
    else:
        flags |= {"weight_ptr": None, "bias_ptr": None}
    return types, flags, f"x {dtype} " + (f"weight {parameter}" if parameter else "no weight")


def _aot_split(
    dtype: str, parameter: str | None, shapes: Sequence[tuple[int, int]], quick: bool = False
) -> Iterator[Case]:
    types, flags, label = _aot_arguments(dtype, parameter)
    pieces = flags | {"BLOCK_N": LOOPED_BLOCK_N, "BLOCK_S": SPLIT_PROGRAMS}
    for kernel in (
        _layer_norm_fwd_split_statistics_kernel,
        _layer_norm_fwd_split_kernel,
        _layer_norm_bwd_split_dx_kernel,
    ):
        yield Case(kernel, label, types, pieces, 8, quick)
    for M, N in shapes:
        config, groups = row_split(M, N)[2::2]
        name = f"{M}x{N} {label} tile {config.block_m}x{config.block_n}"
        tile = flags | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n} | ({"M": 1} if M == 1 else {})
        sums = dict.fromkeys(("dweight_ptr", "dbias_ptr"), "*fp32" if groups > 1 else types["first_ptr"])
        every = tile | {"HAS_DWEIGHT": True, "HAS_DBIAS": True}
        yield Case(_layer_norm_bwd_split_sums_kernel, name, types | sums, every, config.num_warps, quick)
        if M > 1:
            no_sums = {"HAS_DWEIGHT": False, "HAS_DBIAS": False, "dweight_ptr": None, "dbias_ptr": None}
            yield Case(_layer_norm_bwd_split_sums_kernel, f"{name} dx only", types, tile | no_sums, config.num_warps)


def _aot_width(
    N: int, dtype: str, parameter: str | None, arch: int, ones: dict[str, int] | None = None, quick: bool = False
) -> Iterator[Case]:
    types, flags, label = _aot_arguments(dtype, parameter)
    flags |= ones or {}
    label = f"N={N} {label}"
    label += f" {', '.join(ones)} = 1" if ones else ""

    def case(kernel, config: Config) -> Case:
        tile = {"BLOCK_M": config.block_m, "BLOCK_P": config.block_m, "BLOCK_N": config.block_n}
        name = f"{label} tile {config.block_m}x{config.block_n}"
        return Case(kernel, name, types, flags | tile, config.num_warps, quick)

    itemsize = 4 if "fp32" in (dtype, parameter) else 2
    for config in dict.fromkeys(fwd_config(M, N, itemsize, Device(arch, 132)) for M in (2**20, 1)):
        yield case(_layer_norm_fwd_looped_kernel if config.looped else _layer_norm_fwd_kernel, config)
    config = bwd_config(N)
    if config.looped:
        yield case(_layer_norm_bwd_dx_looped_kernel, config)
    else:
        yield case(_layer_norm_bwd_kernel, config)
        yield case(_layer_norm_bwd_dx_kernel, config)
    if N in (1, 4096, 65536):
        yield case(_layer_norm_bwd_dwdb_kernel, dwdb_config(N))
        yield case(_layer_norm_bwd_reduce_kernel, reduce_config(N))
