"""Adaptive windows, and integers for each dimension, as the oracles of pooling need them."""

from __future__ import annotations

from collections.abc import Sequence

Ints = int | Sequence[int]


def per_axis(value: Ints, dims: int) -> list[int]:
    """One integer for each dimension."""
    return [value] * dims if isinstance(value, int) else [int(v) for v in value] * (dims if len(value) == 1 else 1)


def adaptive_windows(size: int, count: int) -> list[range]:
    """The positions of each of ``count`` nearly equal parts: part o ends at (o + 1) * size / count, rounded up."""
    return [range(o * size // count, -(-(o + 1) * size // count)) for o in range(count)]


def adaptive_axes(shape: Sequence[int], dims: int, output_size: int | Sequence[int | None]) -> list[list[range]]:
    """The parts along each of the last ``dims`` axes; None keeps an axis as it is."""
    wanted = list(output_size) if isinstance(output_size, Sequence) else [output_size] * dims
    sizes = shape[len(shape) - dims :]
    return [adaptive_windows(n, n if o is None else o) for n, o in zip(sizes, wanted, strict=True)]
