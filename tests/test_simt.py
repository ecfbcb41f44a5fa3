"""The SIMT host runner: device code gives right results under every schedule, and faulty device code is found."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from _simt import COMPILER, ROOT, UNDER_ASAN, sanitizer_environment

SOURCES = [
    ROOT / "csrc/simt/fiber.cpp",
    ROOT / "csrc/simt/runner.cpp",
    ROOT / "tests/simt/unit_kernels.cu",
    ROOT / "tests/simt/faulty_kernels.cu",
]
FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-DPYDL_SIMT", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/simt/include'}"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fsanitize-recover=address,undefined"]
SEEDS = range(8)

if shutil.which(COMPILER) is None:
    pytest.skip("no C++ compiler: the SIMT host runner cannot be built", allow_module_level=True)


def build(sanitize):
    """Compiles runner and unit kernels into one library, kept under build/ until a source changes."""
    flags = FLAGS + (SANITIZE if sanitize else [])
    headers = [path for folder in ("csrc/common", "csrc/simt", "tests/simt") for path in (ROOT / folder).rglob("*.h")]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted([*SOURCES, *headers]):
        digest.update(path.read_bytes())
    target = ROOT / "build/simt_units" / f"libunits-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    work = target.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True)
    compiles = [
        subprocess.Popen([COMPILER, *flags, "-x", "c++", "-c", str(path), "-o", str(work / f"{path.stem}.o")])
        for path in SOURCES
    ]
    assert [process.wait() for process in compiles] == [0] * len(compiles)
    objects = [str(work / f"{path.stem}.o") for path in SOURCES]
    subprocess.run([COMPILER, *flags, "-shared", *objects, "-o", str(work / "units.so")], check=True)
    os.replace(work / "units.so", target)
    shutil.rmtree(work)
    return target


class Units:
    """Calls the library's entry points; tensors become pointers, a failure becomes RuntimeError."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def __call__(self, name, *args):
        error = ctypes.create_string_buffer(2048)
        converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
        if getattr(self.library, name)(error, *converted) != 0:
            raise RuntimeError(error.value.decode())


@pytest.fixture(scope="module")
def units():
    return Units(build(sanitize=UNDER_ASAN))


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("PYDL_SIMT_SEED", str(request.param))
    return request.param


def expected_shuffle(x):
    lane = np.arange(32)
    segment = lane // 8 * 8
    up, down = lane - 3, lane + 5
    sources = [
        lane ^ 1,
        lane ^ 16,
        np.where(up < 0, lane, up),
        np.where(up < segment, lane, up),
        np.where(down > 31, lane, down),
        np.where(down > segment + 7, lane, down),
        np.full(32, 7),
        segment + 2,
    ]
    return torch.stack([x[torch.from_numpy(source)] for source in sources])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32, torch.int64])
def test_values_shuffles(units, dtype):
    x = (torch.randperm(32) * 3 + 1).to(dtype)
    y = torch.zeros(8, 32, dtype=dtype)
    units(f"shuffle_{str(dtype).split('.')[1]}", x, y)
    assert torch.equal(y, expected_shuffle(x))


def test_values_partial_warps(units, seed):
    x = torch.randint(-100, 100, (48,), dtype=torch.int32)
    y = torch.zeros(48, dtype=torch.int32)
    units("partial_warp", x, y)
    groups = x.view(3, 16)
    expected = torch.stack([groups[0].sum(), groups[1].max(), groups[2].sum()]).int()
    assert torch.equal(y.view(3, 16), expected[:, None].expand(3, 16))


def test_values_votes(units, seed):
    x = torch.randint(-3, 4, (32,), dtype=torch.int32)
    y = torch.zeros(6, 32, dtype=torch.int32)
    units("vote", x, y)
    y = y.numpy().view(np.uint32)
    values = [int(v) for v in x]
    assert (y[0] == sum(1 << i for i, v in enumerate(values) if v > 0)).all()
    assert (y[1] == 0).all() and (y[2] == 1).all() and (y[3] == 0xFFFFFFFF).all()
    assert list(y[4]) == [sum(1 << i for i, v in enumerate(values) if v == mine) for mine in values]
    unsigned = [v & 0xFFFFFFFF for v in values]
    bits = [u.bit_count() + 100 * (32 - u.bit_length()) + 10000 * ((u & -u).bit_length()) for u in unsigned]
    assert list(y[5]) == bits


# 1 and 33 leave a warp partial, 256 is the size the kernel's static array has; 1000 elements are no multiple of any.
@pytest.mark.parametrize("threads", [1, 33, 256])
def test_values_static_and_dynamic_shared(units, seed, threads):
    x = torch.randn(3, 1000)
    y = torch.zeros(3, 1000)
    units("reverse", x, y, 3, 1000, threads)
    assert torch.equal(y, x.flip(1))


def test_values_block_reduction(units, seed):
    x = torch.randint(-50, 50, (5, 777)).float()
    y = torch.zeros(5)
    units("sum_rows", x, y, 5, 777, 128)
    assert torch.equal(y, x.sum(1))


def test_values_atomics(units, seed):
    y = torch.zeros(7, dtype=torch.int32)
    wide = torch.zeros(1, dtype=torch.int64)
    total = torch.zeros(1)
    units("atomics", y, wide, total)
    n = 8 * 128
    assert y[0] == n * (n - 1) // 2 and y[1] == n - 1 and y[2] == -(n - 1)
    assert 1 <= y[3] <= n and y[4] == 1
    assert y[5] == n - 1 and y[6] == 1
    assert wide[0] == n << 31
    assert total[0] == n / 2


# Both sides of 2^32, where the division changes its width, and the largest base.
@pytest.mark.parametrize("item", [0, 1, 2**32 - 1, 2**32, 2**32 + 5, 3 * 2**40 + 7, 2**62])
@pytest.mark.parametrize("base", [1, 3, 1000, 2**31 - 1])
def test_values_index_digits(units, item, base):
    digit, rest = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    units("split", ctypes.c_uint64(item), base, digit, rest)
    assert (int(rest), int(digit)) == divmod(item, base)


def run_grid(units, blocks, threads, steps, cooperative=1):
    values = torch.zeros(2, blocks, dtype=torch.int32)
    values[0] = torch.arange(blocks)
    counter = torch.zeros(1, dtype=torch.int32)
    current = values[0].clone()
    for _ in range(steps):
        current = (current.sum() % 1000 + torch.arange(blocks)).int()
    units("grid", values, counter, blocks, threads, steps, cooperative)
    assert torch.equal(values[steps % 2], current)


def test_values_grid_barrier_over_64_blocks(units):
    run_grid(units, blocks=64, threads=64, steps=3)


def test_values_grid_barrier_seeds(units, seed):
    run_grid(units, blocks=5, threads=32, steps=7)


@pytest.mark.parametrize("columns", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_warp_matrix_product(units, dtype, columns):
    # Tiles must be 32-byte aligned, which torch's CPU allocations (64 bytes) are.
    a = torch.randn(16, 32).to(dtype)
    b = torch.randn(32, 16).to(dtype)
    stored = b.t().contiguous() if columns else b
    c = torch.zeros(16, 16)
    units(f"product_{str(dtype).split('.')[1]}", a, stored, c, columns)
    assert torch.allclose(c.double(), 2 * a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_half_conversions(units, dtype):
    name = f"convert_{str(dtype).split('.')[1]}"
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.zeros(65536)
    units(name, None, every, wide, 65536)
    assert torch.equal(wide.nan_to_num(nan=-7.0), every.float().nan_to_num(nan=-7.0))
    # Random bit patterns cover subnormals, overflow and NaN; neighbours' midpoints +- 1 ulp cover the rounding.
    patterns = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)
    finite = every.float()[every.float().isfinite()].sort().values
    midpoints = (finite[:-1].double() + finite[1:].double()).div(2).float()
    nudged = [torch.nextafter(midpoints, torch.full_like(midpoints, end)) for end in (-np.inf, np.inf)]
    x = torch.cat([patterns.view(torch.float32), midpoints, *nudged])
    low = torch.zeros(len(x), dtype=dtype)
    back = torch.zeros(len(x))
    units(name, x, low, back, len(x))
    expected = x.to(dtype)
    assert torch.equal(low.isnan(), expected.isnan())
    same = low.view(torch.int16) == expected.view(torch.int16)
    assert (same | expected.isnan()).all()
    assert torch.equal(back.nan_to_num(nan=-7.0), expected.float().nan_to_num(nan=-7.0))


@pytest.mark.skipif(UNDER_ASAN, reason="sanitized code is slow")
def test_speed(units):
    x = torch.randn(64, 4096)
    y = torch.zeros(64, 4096)
    units("reverse", x, y, 64, 4096, 256)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        units("reverse", x, y, 64, 4096, 256)
        times.append(time.perf_counter() - start)
    # About 0.01 s on an idle machine; the bound catches a system call in every switch.
    assert min(times) < 0.3


def buffer(n=64, dtype=torch.int32):
    return torch.zeros(n, dtype=dtype)


def line_of(text):
    lines = (ROOT / "tests/simt/faulty_kernels.cu").read_text().splitlines()
    return [i + 1 for i, line in enumerate(lines) if text in line]


@pytest.mark.skipif(UNDER_ASAN, reason="errors are checked without sanitizers")
class TestFaults:
    def test_barrier_divergence_names_kernel_block_and_both_sites(self, units, seed):
        with pytest.raises(RuntimeError, match="kernel diverging_kernel, block .*barrier divergence") as caught:
            units("diverging", buffer())
        first, second = line_of("__syncthreads();")[:2]
        assert f"faulty_kernels.cu:{first}" in str(caught.value)
        assert f"faulty_kernels.cu:{second}" in str(caught.value)
        units("neighbour", buffer(), buffer(), 1)  # the runner works on after an error

    @pytest.mark.parametrize("n", [0, 1, 63])
    def test_return_before_a_barrier(self, units, seed, n):
        if n == 0:
            units("early_exit", buffer(), n)  # all return: nobody waits
            return
        with pytest.raises(RuntimeError, match="early_exit_kernel.*barrier divergence.*returned"):
            units("early_exit", buffer(), n)

    def test_no_thread_returns_early(self, units, seed):
        y = buffer()
        units("early_exit", y, 64)
        assert (y == 2).all()

    def test_warp_divergence(self, units, seed):
        with pytest.raises(RuntimeError, match="warp_divergence_kernel.*warp divergence"):
            units("warp_divergence", buffer())

    def test_deadlock_names_the_missing_lanes(self, units, seed):
        with pytest.raises(RuntimeError, match="deadlock.*for lanes 0xffff0000"):
            units("deadlock", buffer())

    def test_endless_spin(self, units):
        with pytest.raises(RuntimeError, match="deadlock.*64 spin in spin_pause"):
            units("endless_spin", buffer())

    def test_grid_barrier_needs_a_cooperative_launch(self, units):
        with pytest.raises(RuntimeError, match="needs PYDL_LAUNCH_COOPERATIVE"):
            run_grid(units, blocks=4, threads=32, steps=1, cooperative=0)

    def test_lane_that_returned_reads_as_nan(self, units, seed):
        y = buffer(32, torch.float32)
        units("dead_lane", y)
        assert y[:8].isnan().all() and (y[8:31] == 1).all()

    def test_unwritten_shared_memory_is_nan(self, units):
        y = buffer(32, torch.float32)
        units("unwritten_shared", y)
        assert y.isnan().all()

    def test_missing_barrier_shows_under_shuffled_schedules(self, units, monkeypatch):
        x = torch.arange(1, 65, dtype=torch.int32)
        wrong = {0: 0, 1: 0}
        for with_barrier in (0, 1):
            for s in SEEDS:
                monkeypatch.setenv("PYDL_SIMT_SEED", str(s))
                y = buffer()
                units("neighbour", x, y, with_barrier)
                wrong[with_barrier] += not torch.equal(y, x.flip(0))
        assert wrong[1] == 0
        assert wrong[0] == len(SEEDS)

    def test_schedule_is_a_function_of_the_seed(self, units, monkeypatch):
        def result(s):
            monkeypatch.setenv("PYDL_SIMT_SEED", str(s))
            y = buffer()
            units("neighbour", torch.arange(1, 65, dtype=torch.int32), y, 0)
            return y.tolist()

        assert result(3) == result(3)
        assert result(3) != result(4)

    @pytest.mark.parametrize("threads, shared, message", [(1025, 0, "not launchable"), (0, 0, "not launchable")])
    def test_refused_launch(self, units, threads, shared, message):
        with pytest.raises(RuntimeError, match=f"write_kernel.*{message}"):
            units("oversized", buffer(1, torch.float32), threads, shared)

    def test_too_much_shared_memory(self, units):
        with pytest.raises(RuntimeError, match="write_kernel: 232449 bytes of dynamic shared memory"):
            units("oversized", buffer(1, torch.float32), 1, 227 * 1024 + 1)


# name: (entry point and arguments with `extra` elements too many, the report that extra = 1 must give)
FAULTS = {
    "shared": ("shared_overflow(error, pointer(y), extra)", "heap-buffer-overflow"),
    "dynamic_shared": ("dynamic_overflow(error, pointer(y), 37, extra)", "heap-buffer-overflow"),
    "global": ("write_global(error, pointer(y), 100, extra)", "heap-buffer-overflow"),
    "global_odd_bytes": ("write_global(error, pointer(y[:99].clone()), 99, extra)", "heap-buffer-overflow"),
    "global_view": ("write_global(error, pointer(y[:50]), 50, 51 * extra)", "heap-buffer-overflow"),
    "misaligned_vector": ("misaligned(error, pointer(y), pointer(y), extra)", "misaligned address"),
}
PROBE = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
error = ctypes.create_string_buffer(2048)
y = torch.zeros(100)
kept = []
def pointer(tensor):
    kept.append(tensor)
    return ctypes.c_void_p(tensor.data_ptr())
def call(name, code, extra):
    print(f"@@{name}{extra}", file=sys.stderr, flush=True)
    assert eval("library." + code) == 0, error.value
"""


@pytest.fixture(scope="module")
def reports():
    """What the sanitizers print about each fault with extra = 0 and 1, from one process that goes on after each."""
    calls = [f"call({name!r}, {code!r}, {extra})" for name, (code, _) in FAULTS.items() for extra in (0, 1)]
    command = [sys.executable, "-c", PROBE + "\n".join(calls), str(build(sanitize=True))]
    environment = sanitizer_environment(halt=False)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    sections = [section.partition("\n") for section in result.stderr.split("@@")[1:]]
    assert len(sections) == len(calls), result.stderr[-3000:]
    return {name: text for name, _, text in sections}


@pytest.mark.skipif(UNDER_ASAN, reason="starts the sanitized processes itself")
class TestSanitizers:
    @pytest.mark.parametrize("name", FAULTS)
    def test_one_element_too_many_is_reported(self, reports, name):
        assert "ERROR" not in reports[name + "0"] and "runtime error" not in reports[name + "0"], reports[name + "0"]
        assert FAULTS[name][1] in reports[name + "1"]
        assert "faulty_kernels.cu" in reports[name + "1"]

    def test_values_hold_under_the_sanitizers(self):
        build(sanitize=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "values"]
        environment = dict(sanitizer_environment(halt=True), PYDL_TEST_SIMT_ASAN="1")
        result = subprocess.run(
            [*command, str(Path(__file__))], env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert " passed" in result.stdout


@pytest.mark.skipif(UNDER_ASAN, reason="needs no sanitizer")
@pytest.mark.parametrize("source", ["unit_kernels.cu", "faulty_kernels.cu"])
def test_same_source_compiles_with_nvcc(source, tmp_path):
    nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    if not os.path.exists(nvcc):
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++20", "-arch=sm_80", f"-I{ROOT / 'csrc'}", "-c", str(ROOT / "tests/simt" / source)]
    result = subprocess.run([*command, "-o", str(tmp_path / "units.o")], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
