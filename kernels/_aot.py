"""How an op declares what is compiled ahead of time: each ``kernels/<op>.py`` has ``aot_cases(arch)`` yielding Cases.

``python -m pydl kernels`` finds these functions by globbing, so that a new op touches no list.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One specialisation of one kernel, as a launch would request it.

    ``types`` maps every argument that is no constexpr to a Triton type ("*bf16", "i32", "fp32") and ``constexprs`` the
    others to their values, ``None`` for a missing tensor; names that the kernel lacks are left out. Pointers and
    integers are compiled as multiples of 16, as Triton does when the launch's values are. ``quick`` cases are compiled
    for every architecture on each test run, the others only for one of them.
    """

    kernel: Any
    label: str
    types: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    quick: bool = False
    num_stages: int = 1
