"""The specialisations of the attention kernels that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ._aot import Case
from ._attention_tiles import TILE_K, TILE_Q, Tiles, head_block
from ._launch import Device

_STRIDED = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "b", "w", "l")
_FLAGS = ("HAS_BIAS", "HAS_WORDS", "HAS_LENGTHS", "HAS_PADDING", "HAS_IDS", "HAS_PREFIX", "HAS_MAP", "HAS_SOFTCAP")
# which masks are compiled: a band alone, a dense mask alone, everything at once
KINDS = {"band": (), "mask": ("HAS_WORDS", "HAS_MAP"), "every mask": _FLAGS}
_TENSORS = {
    "HAS_BIAS": ("bias_ptr",),
    "HAS_WORDS": ("words_ptr",),
    "HAS_LENGTHS": ("lengths_ptr",),
    "HAS_PADDING": ("padding_ptr",),
    "HAS_IDS": ("q_ids_ptr", "k_ids_ptr"),
    "HAS_PREFIX": ("prefix_ptr",),
    "HAS_MAP": (
        "count_ptr", "list_ptr", "q_count_ptr", "q_list_ptr", "k_count_ptr", "k_list_ptr", "classes_ptr",
    ),
}  # fmt: skip
_INTEGERS = (
    "B", "H", "GROUP", "Sq", "Sk", "D", "DV", "NQ", "NK", "tile_b", "tile_h", "tile_heads", "low", "high", "below",
    "blocks", "turns", "q_blocks", "k_blocks", "q_turns", "k_turns", "BH", "programs", "bias_b", "bias_h", "row_tiles",
    "column_tiles",
)  # fmt: skip


def types_of(dtype: str) -> dict[str, str]:
    """Triton types of every argument that some kernel has."""
    data = [f"{name}_ptr" for name in ("q", "k", "v", "out", "do", "dq", "dk", "dv", "bias", "dbias")]
    types = dict.fromkeys(data, f"*{dtype}") | dict.fromkeys(("lse_ptr", "delta_ptr", "dlse_ptr"), "*fp32")
    for names in _TENSORS.values():
        types |= {name: "*i32" for name in names if name != "bias_ptr"}
    types |= {"q_ids_ptr": "*i64", "k_ids_ptr": "*i64", "lengths_ptr": "*i64", "prefix_ptr": "*i64"}
    types |= {"padding_ptr": "*u8", "classes_ptr": "*u8"} | dict.fromkeys(_INTEGERS, "i32")
    for t in _STRIDED:
        types |= {f"stride_{t}{axis}": "i32" for axis in "bhmnd"}
    return types | {"scale": "fp32", "softcap": "fp32"}


def cases_of(
    kernel: Any, arch: int, choose: Callable[[int, int, int, bool, Device], Tiles], extra: dict[str, Any] | None = None
) -> Iterator[Case]:
    """Head dimensions 64, 128 and 256 in bf16, 16 to 64 in fp32, each precision; innermost strides of 1."""
    for dtype, d, precision in (
        ("bf16", 64, "ieee"),
        ("bf16", 128, "ieee"),
        ("bf16", 256, "ieee"),
        ("fp32", 16, "ieee"),
        ("fp32", 32, "ieee"),
        ("fp32", 64, "ieee"),
        ("fp32", 64, "tf32"),
        ("fp32", 64, "tf32x3"),
    ):
        itemsize = 2 if dtype == "bf16" else 4
        for kind, has in KINDS.items():
            tile = choose(4096, d, itemsize, kind == "every mask", Device(arch, 132))
            if precision != "ieee" and kind != "band":
                continue
            constants: dict[str, Any] = {flag: flag in has for flag in _FLAGS}
            missing = {name: None for flag, names in _TENSORS.items() if flag not in has for name in names}
            ones = {f"stride_{t}{axis}": 1 for t in _STRIDED for axis in "d"} | {"stride_bn": 1}
            constants |= missing | ones | {"BAND": kind != "mask", "PRECISION": precision, **(extra or {})}
            constants |= {"TILE_Q": TILE_Q, "TILE_K": TILE_K, "SPLIT": TILE_K // tile.block_n}
            constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            constants |= {"BLOCK_D": head_block(d), "BLOCK_DV": head_block(d)}
            label = f"{dtype} {precision} D={d} {kind} tile {tile.block_m}x{tile.block_n}"
            quick = dtype == "bf16" and d == 64 and kind == "mask"
            case = Case(kernel, label, types_of(dtype), constants, tile.num_warps, quick, tile.num_stages)
            yield case._replace(constexprs=constants | {"DESCRIBED": False})
            if tile.described:
                rows = {"q_ptr": tile.block_m, "k_ptr": tile.block_n, "v_ptr": tile.block_n}
                types = {name: f"tensordesc<{dtype}[1, 1, {n}, {head_block(d)}]>" for name, n in rows.items()}
                yield case._replace(
                    label=f"{label} described",
                    types=case.types | types,
                    constexprs=constants | {"DESCRIBED": True},
                )
