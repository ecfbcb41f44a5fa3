"""Compiles one declared kernel case for a GPU that need not be there, and reads what it costs.

Runs in processes without TRITON_INTERPRET: the interpreter is bound when a kernel's module is imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pydl.kernels

KB = 1024


class Part(NamedTuple):
    """Limits of one architecture: registers and warps of a multiprocessor, bytes of shared memory.

    From the occupancy tables of the CUDA C++ Programming Guide; for AMD a compute unit of the CDNA 3 ISA guide, with
    wavefronts as warps and vector registers of one SIMD unit.
    """

    backend: str
    target: int | str
    warp_size: int
    warps: int
    blocks: int
    shared: int
    shared_block: int
    registers: int = 65536


PARTS = {
    "sm_80": Part("cuda", 80, 32, 64, 32, 164 * KB, 163 * KB),
    "sm_86": Part("cuda", 86, 32, 48, 16, 100 * KB, 99 * KB),
    "sm_89": Part("cuda", 89, 32, 48, 24, 100 * KB, 99 * KB),
    "sm_90": Part("cuda", 90, 32, 64, 32, 228 * KB, 227 * KB),
    "sm_100": Part("cuda", 100, 32, 64, 32, 228 * KB, 227 * KB),
    "sm_120": Part("cuda", 120, 32, 48, 24, 100 * KB, 99 * KB),
    "gfx942": Part("hip", "gfx942", 64, 32, 32, 64 * KB, 64 * KB, 512),
}


def occupancy(part: Part, registers: int, shared: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that can be resident: the least of what warps, registers and memory allow."""
    blocks = min(part.blocks, part.warps // num_warps)
    if part.backend == "cuda":
        # registers come in units of 256 a warp, each block keeps 1 KB of shared memory for the system
        per_warp = max(-(-registers * part.warp_size // 256), 1) * 256
        blocks = min(blocks, part.registers // per_warp // 4 * 4 // num_warps)
        blocks = min(blocks, part.shared // (shared + KB))
    else:
        waves = 4 * min(8, part.registers // max(-(-registers // 8) * 8, 8))
        blocks = min(blocks, waves // num_warps)
        blocks = min(blocks, part.shared // shared) if shared else blocks
    return blocks * num_warps / part.warps


def modules() -> list[str]:
    """Names of the op modules in pydl.kernels, whether it is a checkout's folder or installed."""
    folders = [Path(path) for path in pydl.kernels.__path__]
    return sorted({p.stem for folder in folders for p in folder.glob("*.py") if not p.stem.startswith("_")})


@functools.cache
def _cases(module: str, arch: str) -> list[Any]:
    part = PARTS[arch]
    number = part.target if isinstance(part.target, int) else 0
    return list(importlib.import_module(f"pydl.kernels.{module}").aot_cases(number))


def _source(case: Any) -> Any:
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.types[name] for name in names}
    constexprs = {name: case.constexprs[name] for name in names if name in case.constexprs}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or signature[name] in ("i32", "i64")]
    return ASTSource(case.kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})


def enumerate_cases(arch: str) -> list[dict[str, Any]]:
    """One row for each case of each op: where to find it, its names, and the key of its cached result."""
    import triton

    rows = []
    for module in modules():
        for index, case in enumerate(_cases(module, arch)):
            name = case.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            text = f"{triton.__version__} {arch} {_source(case).hash()} {case.num_warps} {case.num_stages}"
            row = {"module": module, "index": index, "arch": arch, "kernel": name, "case": case.label}
            rows.append(row | {"quick": case.quick, "key": hashlib.sha256(text.encode()).hexdigest()})
    return rows


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{field}:(\d+)", report) for field in ("REG", "STACK", "LOCAL"))
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resources: {report!r}")
    return int(registers[1]), int(stack[1]) + int(local[1])


def _hip_resources(assembly: str) -> tuple[int, int]:
    registers, private = (
        max((int(value) for value in re.findall(rf"\.{field}:\s*(\d+)", assembly)), default=0)
        for field in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, private


def compile_case(module: str, arch: str, index: int) -> dict[str, Any]:
    """Compile one case; registers a thread, spilled (stack) bytes a thread, shared bytes a block, and occupancy."""
    import triton
    from triton.backends.compiler import GPUTarget

    part, case = PARTS[arch], _cases(module, arch)[index]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    target = GPUTarget(part.backend, part.target, part.warp_size)
    try:
        compiled = triton.compile(_source(case), target=target, options=options)
        cuda = part.backend == "cuda"
        registers, spills = _cuda_resources(compiled.asm["cubin"]) if cuda else _hip_resources(compiled.asm["amdgcn"])
    except Exception as error:  # a case that does not compile is a row of the report, not the end of it
        return {"error": f"{type(error).__name__}: {error}"}
    shared = compiled.metadata.shared
    row = {"registers": registers, "spills": spills, "shared": shared, "warps": case.num_warps}
    return row | {"occupancy": round(occupancy(part, registers, shared, case.num_warps), 3)}


def load_cache(path: Path) -> dict[str, Any]:
    """Results of earlier runs by key; an unreadable file counts as none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
