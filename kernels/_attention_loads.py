"""How the forward of attention reads rows of q, k and v: through pointers, or through tensor descriptors (TMA).

A descriptor is made on the host and stands in its tensor's place among a kernel's arguments. One thread then asks the
copy engine of arch 90 and later for a whole tile, which needs no addresses, masks or registers; what lies outside of
the tensor, in rows or in columns, arrives as 0. That is what pointers give too, bit for bit. Where descriptors are used
is in the tile table (_attention_tiles.py); no GPU has measured the choice.

The backward keeps to pointers. Its sums leave registers for one pipeline stage only, in which a program would wait for
the copy engine before each product; with descriptors its tiles for rows of 512 bytes spill, and so do two stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._attention_tiles import head_block, load_rows

# of addresses and of strides, in bytes: what the copy engine asks for
_ALIGNMENT = 16


@triton.jit
def load_tile(rows, b, h, start, offs, offs_d, S, D, stride_s, stride_d, DESCRIBED: tl.constexpr):
    """As load_rows; ``rows`` is the pointer of head h of item b, or the descriptor of the whole tensor."""
    if DESCRIBED:
        tile = rows.load([tl.cast(b, tl.int32), tl.cast(h, tl.int32), start, 0])
        x = tl.reshape(tile, (offs.shape[0], offs_d.shape[0]))
    else:
        x = load_rows(rows, start, offs, offs_d, S, D, stride_s, stride_d)
    return x


def tile_inputs(
    tensors: Sequence[Tensor], rows: Sequence[int], wanted: bool
) -> tuple[Sequence[Tensor | TensorDescriptor], bool]:
    """The tensors, or their descriptors where they are wanted and every tensor can have one; and which of the two.

    Args:
        tensors: [B, H, S, D].
        rows: of a tile of each of them.
        wanted: what the tile table says.
    """
    if not wanted or not all(map(describable, tensors)):
        return tensors, False
    return [described(t, (n, head_block(t.shape[3]))) for t, n in zip(tensors, rows, strict=True)], True


def describable(t: Tensor) -> bool:
    """Whether the copy engine can read a [B, H, S, D]: aligned, rows contiguous, nothing empty or expanded."""
    itemsize = t.element_size()
    return (
        t.data_ptr() % _ALIGNMENT == 0
        and t.stride(3) == 1
        and t.numel() > 0
        and all(n == 1 or (s > 0 and s * itemsize % _ALIGNMENT == 0) for n, s in zip(t.shape[:3], t.stride()[:3]))
    )


def described(t: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """The descriptor of a tensor that is read in tiles of ``block`` rows and columns."""
    # a dimension of size 1 may have any stride in torch
    strides = [_ALIGNMENT if n == 1 else s for n, s in zip(t.shape[:3], t.stride()[:3])]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, *block])
