"""Ahead-of-time compilation: every kernel builds for every part, does not spill, and fits; tile choice is pure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from pydl.kernels._launch import Device, next_power_of_two  # noqa: E402

from pydl import _aot  # noqa: E402
from pydl._aot_compile import PARTS, modules, occupancy  # noqa: E402
from pydl.kernels import activations, layer_norm, rms_norm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def _run(*arguments, timeout=900):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pydl", "kernels", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.compile
def test_every_kernel_compiles_without_spills(tmp_path):
    report = tmp_path / "kernels.json"
    result = _run("--quick", "--json", report)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    rows = json.loads(report.read_text())["triton"]
    kernels = {row["kernel"] for row in rows}
    assert {row["module"] for row in rows} == set(modules())
    for arch, part in PARTS.items():
        on_arch = [row for row in rows if row["arch"] == arch]
        assert {row["kernel"] for row in on_arch} == kernels
        for row in on_arch:
            assert row["shared"] <= part.shared_block, row
            assert 0 < row["occupancy"] <= 1, row
            # the limit of a thread, and of what a block's warps share
            assert 0 < row["registers"] <= (255 if part.backend == "cuda" else 512), row
    assert not any(row["spills"] for row in rows if row["arch"] in ("sm_80", "sm_90"))


@pytest.mark.compile
def test_a_second_run_takes_results_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYDL_CACHE_DIR", str(tmp_path))
    first = _run("--match", "activation_fwd step fp32")
    assert first.returncode == 0 and "1 compilations, 0 problems" in first.stdout, first.stdout + first.stderr
    results = json.loads((tmp_path / "kernel_resources.json").read_text())
    for row in results.values():
        row["registers"] = 7777
    (tmp_path / "kernel_resources.json").write_text(json.dumps(results))
    assert "7777" in _run("--match", "activation_fwd step fp32").stdout


def _row(**changes):
    return {"arch": "sm_86", "kernel": "k", "case": "c", "spills": 0, "shared": 0, "registers": 32} | changes


def test_problems_are_found():
    table = {"sm_86": {"k c": 16}, "sm_90": {"k c": 16}}
    assert _aot.problems([_row(), _row(spills=16)], table) == []
    assert "24 bytes spilled, 16 allowed" in _aot.problems([_row(spills=24)], table)[0]
    # the table cannot excuse a part that must not spill
    assert "16 bytes spilled, 0 allowed" in _aot.problems([_row(arch="sm_90", spills=16)], table)[0]
    # 100 KB fit sm_90 but not sm_86
    assert _aot.problems([_row(arch="sm_90", shared=100 * 1024)], table) == []
    assert "101376 available" in _aot.problems([_row(shared=100 * 1024)], table)[0]
    assert "boom" in _aot.problems([_row(error="boom")], table)[0]


def test_spills_of_native_kernels_are_found():
    row = {"arch": "sm_90", "kernel": "void k<float>()", "spill_stores": 8}
    assert "8 bytes spilled" in _aot.native_problems([row])[0]
    assert _aot.native_problems([row | {"spill_stores": 0}, row | {"arch": "sm_86"}]) == []


def test_committed_table_lists_only_parts_that_may_spill():
    tables = json.loads(_aot.TABLE.read_text())
    for series, table in tables.items():
        assert _aot.load_table(series) == table
        assert set(table) <= set(PARTS) - set(_aot.NO_SPILLS)
        assert all(spills > 0 for cases in table.values() for spills in cases.values())
    assert _aot.load_table("0.0") == {}
    rows = [_row(spills=8), _row(arch="sm_90", spills=8), _row(case="d"), _row(arch="sm_120", error="x")]
    assert _aot.spill_table(rows) == {"sm_86": {"k c": 8}}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),  # nothing limits
        ("sm_90", 128, 0, 8, 0.25),  # 65,536 / (128 * 32) = 16 warps of 64
        ("sm_90", 255, 0, 4, 0.125),  # 255 rounds up to 256: 8 warps
        ("sm_90", 32, 113 * 1024, 4, 0.125),  # two blocks with their reserved KB in 228 KB
        ("sm_86", 32, 0, 1, 1 / 3),  # 16 blocks of one warp in 48
        ("sm_86", 32, 99 * 1024, 4, 1 / 12),  # one block
        ("gfx942", 128, 0, 4, 0.5),  # 4 of 8 waves on each SIMD unit
        ("gfx942", 32, 40 * 1024, 4, 0.125),  # one block in 64 KB
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert occupancy(PARTS[arch], registers, shared, warps) == pytest.approx(expected)


# ---- tile choice

# around every power of two, and odd sizes between
SIZES = sorted({max(2**k + d, 1) for k in range(18) for d in (-1, 0, 1)} | {3, 100, 1000, 5000, 50257})
DEVICES = [Device(80, 108), Device(90, 132), Device(120, 170), Device(0, 304)]


def _declared(kernel, names, device):
    return {
        (*(case.constexprs.get(name) for name in names), case.num_warps)
        for module in (layer_norm, activations)
        for case in module.aot_cases(device.arch)
        if case.kernel.__name__ == kernel
    }


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"arch{device.arch}")
def test_every_tile_that_can_be_chosen_is_compiled_ahead_of_time(device):
    chosen = {name: set() for name in ("fwd", "fwd_looped", "bwd", "bwd_dx_looped", "bwd_dwdb", "bwd_reduce")}
    for N in SIZES:
        for M in (1, 100, 10**4, 10**7):
            for itemsize in (2, 4):
                config = layer_norm.fwd_config(M, N, itemsize, device)
                assert config == layer_norm.fwd_config(M, N, itemsize, device)
                assert config.looped or config.block_n >= N
                chosen["fwd_looped" if config.looped else "fwd"].add(config[:3])
        for name, config in (
            ("bwd_dx_looped" if layer_norm.bwd_config(N).looped else "bwd", layer_norm.bwd_config(N)),
            ("bwd_dwdb", layer_norm.dwdb_config(N)),
            ("bwd_reduce", layer_norm.reduce_config(N)),
        ):
            chosen[name].add(config[:3])
    for name, configs in chosen.items():
        names = ("BLOCK_P" if name == "bwd_reduce" else "BLOCK_M", "BLOCK_N")
        assert configs <= _declared(f"_layer_norm_{name}_kernel", names, device), name
    blocks = {activations.config(n, itemsize, device) for n in (1, 10**6, 10**9, 2**33) for itemsize in (2, 4)}
    assert blocks <= _declared("_activation_fwd_kernel", ("BLOCK",), device)


def test_partial_sums_are_fixed_by_sizes_and_device():
    for N in SIZES:
        for M in (1, 7, 1000, 10**6):
            for device in DEVICES:
                config = layer_norm.bwd_config(N)
                partials = layer_norm.num_partials(M, config, device)
                assert 1 <= partials <= max(16 // config.num_warps, 1) * device.sm_count
                assert partials <= -(-M // config.block_m)
                assert 1 <= layer_norm.num_row_splits(M, N, device) <= M


def test_wide_rows_are_cut_by_their_shape():
    for N in (*SIZES, 65539, 100003, 2**19 + 1, 10**6, 2**31 + 7):
        for M in (1, 2, 31, 32, 64, 255, 256, 10**6):
            split = layer_norm.row_split(M, N)
            if N <= 32768 or M >= 256:
                assert split is None
                continue
            assert (split.pieces - 1) * split.piece < N <= split.pieces * split.piece
            assert 2 <= split.pieces and M * split.pieces <= layer_norm.SPLIT_PROGRAMS
            assert M * split.pieces >= min(4 * M, 128) or N < 10**6  # enough of them to fill a part
            assert (split.blocks - 1) * split.config.block_n < N <= split.blocks * split.config.block_n
            assert split.groups == 1 or M >= 16 * split.groups  # partial sums stay small beside x


def test_every_tile_of_cut_rows_is_compiled_ahead_of_time():
    chosen = {layer_norm.row_split(M, N).config for M in (1, 255) for N in (32769, 65536, 2**19 - 1, 2**19, 10**8)}
    for module, name in ((layer_norm, "_layer_norm"), (rms_norm, "_rms_norm")):
        cases = [case for case in module.aot_cases(90) if case.kernel.__name__ == f"{name}_bwd_split_sums_kernel"]
        compiled = {(c.constexprs["BLOCK_M"], c.constexprs["BLOCK_N"], c.num_warps) for c in cases}
        assert compiled == {config[:3] for config in chosen}


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]


def test_no_size_is_a_constexpr_by_choice():
    """Triton itself compiles a size of 1 into a kernel; any other constexpr size would recompile for each shape."""
    for module in (layer_norm, rms_norm, activations):
        for case in module.aot_cases(90):
            assert all(case.constexprs.get(name, 1) == 1 for name in ("M", "N", "P", "S", "piece", "n")), case
