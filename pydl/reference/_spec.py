"""How a reference module describes its op to `pydl verify`: names, oracle, gradient and the inputs worth trying."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Case:
    """One call: `args` and `kwargs` follow torch's signature, with arrays where torch takes tensors.

    Floating arrays are float64 and become tensors of the dtype that is graded; integers and booleans keep their dtype.

    Args:
        name: shown in the report.
        args: positional arguments, arrays for tensors.
        kwargs: keyword arguments.
        gradients: whether the gradient is graded too; not where torch's own is an accident (NaN times 0).
        second: whether second derivatives are graded, by differences of the oracle's gradient: away from kinks only.
        layouts: whether the call is repeated with strided, expanded and misaligned tensors.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    gradients: bool = True
    second: bool = False
    layouts: bool = False

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The tensors among the arguments, in order: positional, then by keyword, also those in tuples and lists."""
        return tuple(_arrays_in((*self.args, *self.kwargs.values())))

    def replace(self, values: Iterable[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with other values in the place of the arrays."""
        supply = iter(values)
        args = [_replaced(a, supply) for a in self.args]
        return args, {name: _replaced(a, supply) for name, a in self.kwargs.items()}


def _arrays_in(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _arrays_in(part)


def _replaced(value: Any, supply: Iterator[Any]) -> Any:
    if isinstance(value, np.ndarray):
        return next(supply)
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(part, supply) for part in value)
    return value


def _no_reduction(*args: Any, **kwargs: Any) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Spec:
    """An op as the grader sees it.

    Args:
        name: the op's name in `pydl.functional`.
        torch_name: dotted path of torch's own op below `torch`; "module:function" of a composition of torch's ops where
            torch has none, or "".
        forward: oracle with torch's signature; returns an array, or a tuple whose integer members are compared exactly.
        gradient: `gradient(dy, *args, **kwargs)` gives one array per floating tensor argument that is no constant; dy
            belongs to the first result. None for an op without a derivative.
        cases: builds the inputs.
        reductions: number of terms summed into each gradient, in the order of those gradients (1 if shorter).
        dtypes: names of the dtypes the op promises.
        derivative: whether the gradient is the derivative of the values; torch defines that of the CTC loss otherwise.
        widened: whether results are float32 where the input is half precision; torch is then given float32.
        constants: positions, in args, of floating tensors that have no derivative; they are held fixed.
    """

    name: str
    torch_name: str
    forward: Callable[..., Any]
    gradient: Callable[..., tuple[np.ndarray, ...]] | None
    cases: Callable[[], Iterable[Case]]
    reductions: Callable[..., tuple[int, ...]] = _no_reduction
    dtypes: tuple[str, ...] = FLOATS
    derivative: bool = True
    widened: bool = False
    constants: tuple[int, ...] = ()

    def varies(self, case: Case) -> list[bool]:
        """For each of a case's arrays whether it has a gradient; gradients are returned in this order."""
        fixed = [i in self.constants for i, a in enumerate(case.args) for _ in _arrays_in(a)]
        fixed += [False] * (len(case.arrays) - len(fixed))
        return [np.issubdtype(a.dtype, np.floating) and not f for a, f in zip(case.arrays, fixed, strict=True)]
