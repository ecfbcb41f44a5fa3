"""What the launchers of layer and RMS normalisation share: tile choice, rows of any tensor, parameters."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from ._launch import Device, cdiv, next_power_of_two

MAX_TILE_BYTES_FWD = 65536
MAX_TILE_BWD = 8192
LOOPED_BLOCK_N = 4096
SPLIT_MIN_COLUMNS = 32769
# twice the multiprocessors of a large part: from here on one program per row keeps it busy
SPLIT_MAX_ROWS = 255
SPLIT_PROGRAMS = 1024


class Config(NamedTuple):
    """Rows and columns of a tile and warps per program; ``looped`` when a row takes several tiles."""

    block_m: int
    block_n: int
    num_warps: int
    looped: bool = False


@functools.lru_cache(maxsize=4096)
def fwd_config(M: int, N: int, itemsize: int, device: Device) -> Config:
    """Tile of the forward: 8 KB of narrow rows, or one wide row with up to 64 elements a thread.

    ``itemsize`` is that of the widest of x, weight and bias: all three are held at once.
    """
    block_n = max(next_power_of_two(N), 16)
    if block_n * itemsize > MAX_TILE_BYTES_FWD:
        return Config(1, LOOPED_BLOCK_N, 8, looped=True)
    if block_n >= 2048:
        return Config(1, block_n, {2048: 4, 4096: 8, 8192: 8}.get(block_n, 16))
    block_m = min(8192 // itemsize // block_n, 64)
    # too few programs to fill the part: a quarter of the rows each
    return Config(block_m if M >= block_m * device.sm_count else max(block_m // 4, 1), block_n, 4)


@functools.lru_cache(maxsize=4096)
def bwd_config(N: int) -> Config:
    """Tile of the backward: 16 elements a thread for any dtype, since fp32 x, dy, weight and two sums are held."""
    block_n = max(next_power_of_two(N), 16)
    if block_n > MAX_TILE_BWD:
        return Config(1, LOOPED_BLOCK_N, 8, looped=True)
    if block_n >= 2048:
        return Config(1, block_n, block_n // 512)
    return Config(min(2048 // block_n, 64), block_n, 4)


def num_partials(M: int, config: Config, device: Device) -> int:
    """Programs of the fused backward, hence rows of partial sums: a function of sizes and device only."""
    per_sm = max(16 // config.num_warps, 1)
    return min(cdiv(M, config.block_m), per_sm * device.sm_count)


def dwdb_config(N: int) -> Config:
    """Tile of the dweight and dbias kernel: long pieces of few wide rows, short ones of many narrow rows."""
    return Config(4, 512, 4) if N >= 8192 else Config(16, 128, 4)


def reduce_config(N: int) -> Config:
    """Tile of the sum over partial rows: narrow where there are few columns, so that all multiprocessors take part."""
    return Config(8, 256, 4) if N >= 16384 else Config(128, 32, 4)


def num_row_splits(M: int, N: int, device: Device) -> int:
    """Programs that share a block of columns in the dweight and dbias kernel."""
    config = dwdb_config(N)
    wanted = cdiv(4 * device.sm_count, cdiv(N, config.block_n))
    return min(wanted, cdiv(M, config.block_m))


class Split(NamedTuple):
    """How wide rows are cut: ``pieces`` of ``piece`` columns, and for the sums over rows and columns ``config``'s tiles
    in ``blocks`` of columns times ``groups`` of rows."""

    piece: int
    pieces: int
    config: Config
    blocks: int
    groups: int


@functools.lru_cache(maxsize=4096)
def row_split(M: int, N: int) -> Split | None:
    """The cut of M rows of N columns, a function of the shape alone; None where a program takes a whole row.

    There are about SPLIT_PROGRAMS pieces of whole tiles, and never more for one row. A group of rows that leaves fp32
    partial sums behind has at least 16 of them, so that those stay below a quarter of the bytes of x; a single group's
    sums are final.
    """
    if N < SPLIT_MIN_COLUMNS or M > SPLIT_MAX_ROWS:
        return None
    tiles = cdiv(N, LOOPED_BLOCK_N)
    piece = cdiv(tiles, min(tiles, SPLIT_PROGRAMS // M)) * LOOPED_BLOCK_N
    # narrow blocks while all programs together add few of them
    config = Config(4, 512, 4) if N < 2**19 else Config(1, 2048, 4)
    blocks = cdiv(N, config.block_n)
    return Split(piece, cdiv(N, piece), config, blocks, min(cdiv(512, blocks), max(M // 16, 1)))


def check_rows(op: str, x: Tensor, M: int, N: int) -> None:
    # what memory safety needs; the public functions raise torch's own errors before this
    if x.numel() != M * N:
        raise ValueError(f"{op}: expected {M} rows of {N} elements, got shape {tuple(x.shape)}")


def contiguous_parameter(op: str, name: str, parameter: Tensor | None, N: int) -> Tensor | None:
    if parameter is None:
        return None
    if parameter.numel() != N:
        raise ValueError(f"{op}: {name} must have {N} elements, got {parameter.numel()}")
    return parameter.contiguous()


def as_rows(x: Tensor, M: int, N: int) -> tuple[Tensor, int]:
    """``x`` as M rows of N adjacent elements, and the distance between rows; copies only if no such view exists."""
    if x.is_contiguous():
        return x, N
    rows = x.reshape(M, N)
    if N > 1 and rows.stride(1) != 1:
        return x.contiguous(), N
    return rows, rows.stride(0)
