"""One call to be graded: inputs placed between NaN canaries in a chosen layout, and what the oracle says of them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic as deterministic
from torch import Tensor

from pydl.reference import Case, Spec

LAYOUTS = ("contiguous", "misaligned", "cropped", "strided", "transposed", "expanded", "channels_last")
MARGIN = 64  # elements of NaN before and after every input: also keeps the 16-byte alignment of what lies between
DIFFERENCE_STEP = 1e-5
DIFFERENCE_ERR = 1e-7  # relative error of a central difference with that step, in float64

Tensors = list[Tensor]


_M_PERTURB, _ALL_ONES = -6, 0x100  # glibc fills what malloc returns with the complement of the low byte
_poisoned = 0


@functools.cache
def _mallopt() -> Callable[[int, int], int]:
    """glibc's mallopt; does nothing where the C library has none."""
    try:
        function: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return lambda option, value: 0
    return function


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN (integers all ones or their largest value), so that an element nobody wrote is seen.

    Torch's own switch covers what the dispatcher allocates, on every device. C++ code that allocates through the stable
    ABI's `aoti_torch_empty_strided` passes it by: for that malloc itself is told to fill.
    """
    global _poisoned
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    _mallopt()(_M_PERTURB, _ALL_ONES)
    _poisoned += 1
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        _poisoned -= 1
        if _poisoned == 0:
            _mallopt()(_M_PERTURB, 0)
        torch.use_deterministic_algorithms(before, warn_only=warn)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class Guarded:
    """A tensor in the middle of a larger buffer of NaN; `intact()` tells whether anything in the buffer was changed."""

    def __init__(self, values: np.ndarray, layout: str, dtype: torch.dtype, device: torch.device) -> None:
        if not np.issubdtype(values.dtype, np.floating):
            dtype = torch.from_numpy(values[..., :0].copy() if values.ndim else values.copy()).dtype
        size, order = list(values.shape), list(range(values.ndim))
        room, take = list(size), [slice(None)] * values.ndim
        if layout == "transposed" and values.ndim > 1:
            order[-2:] = order[:-3:-1]
        elif layout == "channels_last" and values.ndim == 4:
            order = [0, 2, 3, 1]
        elif layout == "cropped" and values.ndim > 1:
            room[-1] += 3  # rows do not follow one another, and no row but the first is aligned
        elif layout == "strided" and values.ndim:
            room[-1] *= 2
            take[-1] = slice(None, None, 2)
        elif layout == "expanded" and values.ndim > 1:
            room[0] = min(1, size[0])
        margin = 1 if layout == "misaligned" else MARGIN
        count = int(np.prod(room))
        self.buffer = torch.full((count + 2 * MARGIN,), _canary(dtype), dtype=dtype, device=device)
        stored = [room[axis] for axis in order]
        block = self.buffer[margin : margin + count].view(stored).permute(np.argsort(order).tolist())
        block = block[tuple(slice(0, n) if layout == "cropped" else t for n, t in zip(size, take, strict=True))]
        block.copy_(torch.from_numpy(np.array(values[: room[0]] if values.ndim else values)))
        self.tensor = block.expand(size)
        self._before = self.buffer.clone()

    def intact(self) -> bool:
        """Whether neither the values nor the canaries around them were written."""
        return same_bits(self.buffer, self._before)


def _canary(dtype: torch.dtype) -> float | int:
    """What stands beside a tensor: NaN, or the smallest integer, which is no index, label or length."""
    if dtype.is_floating_point:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).min


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of shape, dtype and every bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat_a, flat_b = a.detach().reshape(-1).contiguous(), b.detach().reshape(-1).contiguous()
    return torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))


def applicable(case: Case) -> list[str]:
    """Layouts that differ from "contiguous" for this case's first tensor."""
    ndim = case.arrays[0].ndim
    least = {"misaligned": 1, "cropped": 2, "strided": 1, "transposed": 2, "expanded": 2, "channels_last": 4}
    return [name for name, n in least.items() if ndim >= n and (name != "channels_last" or ndim == 4)]


class Problem:
    """A case in one dtype and layout, with the oracle's answers computed on demand from the rounded inputs."""

    def __init__(self, spec: Spec, case: Case, dtype: torch.dtype, layout: str = "contiguous") -> None:
        self.spec, self.case, self.dtype, self.layout = spec, case, dtype, layout
        arrays = [_round(a, dtype) for a in case.arrays]
        if layout == "expanded":
            arrays[0] = np.broadcast_to(arrays[0][:1], arrays[0].shape).copy()
        self.arrays = arrays
        self.varies = spec.varies(case)
        self.floating = [a for a, varies in zip(arrays, self.varies, strict=True) if varies]
        self._rng = np.random.default_rng(zlib.crc32(f"{spec.name} {case.name} {layout}".encode()))

    @property
    def name(self) -> str:
        return self.case.name if self.layout == "contiguous" else f"{self.case.name}, {self.layout}"

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of floating results where torch has no say."""
        return torch.float32 if self.spec.widened and self.dtype.itemsize < 4 else self.dtype

    def place(
        self, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[list[Guarded], list[Any], dict[str, Any]]:
        """Fresh inputs, in the problem's dtype or a wider one, and the arguments made of them."""
        first = "strided" if self.layout == "strided" else "misaligned" if self.layout == "misaligned" else "contiguous"
        layouts = [self.layout, *([first] * len(self.arrays))]
        guards = [
            Guarded(a, layout, dtype or self.dtype, device)
            for a, layout in zip(self.arrays, layouts[: len(self.arrays)], strict=True)
        ]
        return guards, *self.case.replace(guard.tensor for guard in guards)

    def _substitute(self, floating: Sequence[np.ndarray]) -> tuple[list[Any], dict[str, Any]]:
        """The oracle's arguments with other values for the floating tensors."""
        supply = iter(floating)
        return self.case.replace(
            next(supply) if varies else a for a, varies in zip(self.arrays, self.varies, strict=True)
        )

    def _forward(self, floating: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        args, kwargs = self._substitute(floating)
        out = self.spec.forward(*args, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    def _gradient(self, floating: Sequence[np.ndarray], dy: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        if self.spec.gradient is None:
            raise ValueError(f"{self.spec.name} has no derivative")
        args, kwargs = self._substitute(floating)
        return self.spec.gradient(self.dy if dy is None else dy, *args, **kwargs)

    @functools.cached_property
    def values(self) -> tuple[np.ndarray, ...]:
        """The oracle's outputs."""
        return self._forward(self.floating)

    @functools.cached_property
    def dy(self) -> np.ndarray:
        """A random gradient of the first output, exact in the dtype."""
        return _round(self._rng.standard_normal(self.values[0].shape), self.result_dtype)

    @functools.cached_property
    def gradients(self) -> tuple[np.ndarray, ...]:
        """The oracle's gradients of sum(dy * y), one per floating tensor argument."""
        return self._gradient(self.floating)

    @functools.cached_property
    def directions(self) -> list[np.ndarray]:
        """Random cotangents of the gradients, one per floating tensor argument."""
        return [_round(self._rng.standard_normal(a.shape), self.dtype) for a in self.floating]

    @functools.cached_property
    def second(self) -> tuple[np.ndarray, ...]:
        """Gradients of sum(direction * gradient) with respect to every floating tensor argument and dy.

        The Hessian of sum(dy * y) is symmetric, so they are its product with the directions: the derivative of the
        oracle's gradient along them, and for dy the derivative of its output; both by central differences.
        """
        h = DIFFERENCE_STEP
        ahead = [a + h * v for a, v in zip(self.floating, self.directions, strict=True)]
        behind = [a - h * v for a, v in zip(self.floating, self.directions, strict=True)]
        after, before = self._gradient(ahead), self._gradient(behind)
        slopes = [(p - m) / (2 * h) for p, m in zip(after, before, strict=True)]
        if self.spec.derivative:
            return (*slopes, (self._forward(ahead)[0] - self._forward(behind)[0]) / (2 * h))
        return (*slopes, self._along_dy())

    def _along_dy(self) -> np.ndarray:
        """Gradient of sum(direction * gradient) with respect to dy, in which the gradient is linear: unit by unit."""
        out = np.zeros(self.dy.size)
        for i in range(self.dy.size):
            unit = np.zeros(self.dy.size)
            unit[i] = 1.0
            given = self._gradient(self.floating, unit.reshape(self.dy.shape))
            out[i] = sum(float((g * v).sum()) for g, v in zip(given, self.directions, strict=True))
        return out.reshape(self.dy.shape)

    @functools.cached_property
    def reductions(self) -> list[int]:
        """Number of terms behind each gradient."""
        args, kwargs = self._substitute(self.floating)
        given = self.spec.reductions(*args, **kwargs)
        return [*given, *([1] * (len(self.floating) - len(given)))]


def _round(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.floating):
        return values
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy().reshape(values.shape)


@functools.lru_cache(maxsize=64)
def problems(spec: Spec, dtype: torch.dtype) -> tuple[Problem, ...]:
    """Every case of an op in one dtype, those marked so in every layout; kept, since several backends face them."""
    found: list[Problem] = []
    for case in spec.cases():
        found.append(Problem(spec, case, dtype))
        if case.layouts:
            found += [Problem(spec, case, dtype, layout) for layout in applicable(case)]
    return tuple(found)
