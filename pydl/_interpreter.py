"""What makes Triton's interpreter a fair stand-in for a GPU: exact bfloat16, and guarded memory.

The interpreter keeps bfloat16 as uint16 bit patterns and, up to Triton 3.9, computes on the patterns: products, dots
and comparisons are wrong, and fp32 is truncated instead of rounded. :func:`repair` widens to fp32 and rounds to nearest
even, and it makes calls of device functions cheap. The interpreter does not see an access outside a tensor either:
:class:`Canaries` puts tensors between NaN guards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Canaries", "repair", "repaired"]


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bit patterns of the bfloat16 nearest to each fp32, ties to even; any NaN becomes 0x7fc0, as in torch."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(x: Any) -> bool:
    # Triton labels a comparison's boolean data with its operands' dtype
    return str(x.dtype.scalar) == "bf16" and x.data.dtype != np.bool_


def _widen(x: Any) -> Any:
    import triton.language as tl

    return type(x)((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if _is_bf16(x) else x


def _narrow(x: Any) -> Any:
    import triton.language as tl

    if x.data.dtype == np.bool_:
        return type(x)(x.data, tl.int1)
    return type(x)(_round_to_bf16(x.data), tl.bfloat16)


def _elementwise(original: Callable, operands: int) -> Callable:
    def method(self: Any, *args: Any) -> Any:
        handles, rest = args[:operands], args[operands:]
        if rest == (np.where,) or not any(_is_bf16(x) for x in handles):
            return original(self, *args)
        with np.errstate(over="ignore", invalid="ignore"):
            return _narrow(original(self, *map(_widen, handles), *rest))

    return method


def _cast(original: Callable) -> Callable:
    import triton.language as tl

    def method(self: Any, src: Any, dst_type: Any) -> Any:
        if str(dst_type.scalar) != "bf16":
            return original(self, _widen(src), dst_type)
        return src if _is_bf16(src) else _narrow(original(self, src, tl.float32))

    return method


def _dot(original: Callable) -> Callable:
    def method(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, _widen(a), _widen(b), d, *rest)

    return method


def _refuse(original: Callable) -> Callable:
    def method(self: Any, input: Any) -> Any:
        if any(str(arg.dtype.scalar) == "bf16" for arg in input):
            raise TypeError("the interpreter reduces bfloat16 as integers: convert to float32 first")
        return original(self, input)

    return method


def _index(original: Callable) -> Callable:
    def patch(tensor: Any, *rest: Any) -> None:
        original(tensor, *rest)
        # Triton 3.6 converts an array of one element, which NumPy 2.4 refuses: loops over run-time bounds need this
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch


def _device_call(original: Callable) -> Callable:
    import triton.language as tl

    languages: dict[Any, list[Any]] = {}

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the original patches the language anew for each call, which costs more than most device functions
        if self.fn not in languages:
            languages[self.fn] = [m for m in self.fn.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages[self.fn]):
            return original(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    return method


def _repairs() -> dict[tuple[Any, str], Callable]:
    """The replacement of each wrong function, by its owner and name."""
    from triton.runtime import interpreter

    builder, reductions = interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface
    return {
        (builder, "cast_impl"): _cast(builder.cast_impl),
        (builder, "binary_op"): _elementwise(builder.binary_op, 2),
        (builder, "unary_op"): _elementwise(builder.unary_op, 1),
        (builder, "ternary_op"): _elementwise(builder.ternary_op, 3),
        (builder, "create_fma"): _elementwise(builder.create_fma, 3),
        (builder, "create_dot"): _dot(builder.create_dot),
        (reductions, "check_tensor"): _refuse(reductions.check_tensor),
        (interpreter, "_patch_lang_tensor"): _index(interpreter._patch_lang_tensor),
        (interpreter.InterpretedFunction, "__call__"): _device_call(interpreter.InterpretedFunction.__call__),
    }


_originals: dict[tuple[Any, str], Callable] = {}


def repair() -> None:
    """Make the interpreter of this process exact in bfloat16; a second call does nothing."""
    if _originals:
        return
    for (owner, name), method in _repairs().items():
        _originals[owner, name] = getattr(owner, name)
        setattr(owner, name, method)


@contextlib.contextmanager
def repaired(active: bool) -> Iterator[None]:
    """Run a block with the repair in place, or with Triton's own methods, and put back what was there."""
    was_active = bool(_originals)
    _set_repaired(active)
    try:
        yield
    finally:
        _set_repaired(was_active)


def _set_repaired(active: bool) -> None:
    if active:
        repair()
        return
    for (owner, name), method in _originals.items():
        setattr(owner, name, method)
    _originals.clear()


class Canaries(TorchDispatchMode):
    """Places tensors, also those allocated inside the block, between guards and checks the guards on exit.

    Reading a guard of a floating-point tensor gives NaN, which shows in the result; writing one raises
    :class:`MemoryError` with the tensor's shape when the block ends. Gaps between the elements of a strided tensor are
    guarded too. Call launchers directly: allocations inside a dispatcher op are not seen.

    >>> with Canaries() as canaries:
    ...     y, mean, rstd = layer_norm_fwd(canaries.place(x), (4,), None, None, 1e-5)
    """

    GUARD = 2048
    _NAN = {
        torch.float16: (torch.int16, 0x7E00),
        torch.bfloat16: (torch.int16, 0x7FC0),
        torch.float32: (torch.int32, 0x7FC0_0000),
        torch.float64: (torch.int64, 0x7FF8 << 48),
    }
    _ALLOCATIONS = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self._guarded: list[tuple[Tensor, Tensor, Tensor]] = []

    def place(self, x: Tensor) -> Tensor:
        """A guarded copy of ``x`` with the same strides (overlapping elements, as in an expanded tensor, stay so)."""
        with torch.utils._python_dispatch._disable_current_modes():
            copy = self._guard(x)
            if x.numel():
                # an expanded dimension is one element in memory
                once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
                copy[once].copy_(x[once])
        return copy

    def _guard(self, like: Tensor) -> Tensor:
        if like.numel() == 0:
            return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
        span = sum((size - 1) * stride for size, stride in zip(like.size(), like.stride())) + 1
        buffer = torch.empty(span + 2 * self.GUARD, dtype=like.dtype)
        # guards of two tensors differ, so that a lane that escapes in both is seen to have copied one to the other
        integers, nan = self._NAN.get(like.dtype, (like.dtype, 0))
        payload = torch.arange(buffer.numel()).add_(17 * len(self._guarded)).remainder_(63).add_(1)
        buffer.view(torch.uint8 if integers is torch.bool else integers).copy_(payload + nan)
        outside = torch.ones(buffer.numel(), dtype=torch.bool)
        layout = (like.size(), like.stride(), self.GUARD)
        outside.as_strided(*layout).fill_(False)
        self._guarded.append((buffer, buffer.clone(), outside))
        return buffer.as_strided(*layout)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._ALLOCATIONS and out.device.type == "cpu" and out.numel():
            return self._guard(out)
        return out

    def check(self) -> None:
        """Raise :class:`MemoryError` if a byte outside the guarded tensors' elements was written."""
        for buffer, before, outside in self._guarded:
            size = buffer.element_size()
            changed = (buffer.view(torch.uint8) != before.view(torch.uint8)).view(-1, size).any(dim=1) & outside
            if changed.any():
                first = int(changed.nonzero()[0]) - self.GUARD
                elements = int((~outside).sum())
                raise MemoryError(
                    f"{int(changed.sum())} elements outside a tensor of {elements} {buffer.dtype} were written, the "
                    f"first at offset {first}"
                )

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            self.check()
