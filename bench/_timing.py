"""Clocks: samples of one call on the CPU or a GPU, host cost, launches, hidden syncs, and the two roofs.

CPU: a sample is as many calls in a row as take about a millisecond; outputs are allocated by the call itself. The
kernel's scheduler counts how long our threads stood in line for a core that other work held; a sample in which they did
is taken again, for every provider alike, and counted as disturbed when no attempt was free of it.
GPU: a sample is one call between two events with the L2 cache flushed before it. A batch of samples is queued behind a
spinning kernel that outlasts the host's work, so the stream never runs dry and the events bracket device time only; a
batch during which the spin ended too early is measured again behind a longer one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch

from bench._stats import median

SAMPLE_MS = 1.0
QUIET_SHARE = 0.03
PATIENCE_MS = 60.0
_SPIN_LIMIT_MS = 40.0


def cpu_sample(call: Callable[[], object], inner: int) -> float:
    """Milliseconds per call over `inner` calls."""
    repeats = range(inner)
    start = time.perf_counter_ns()
    for _ in repeats:
        call()
    return (time.perf_counter_ns() - start) / inner * 1e-6


def waited_ns() -> int:
    """Nanoseconds that the threads of this process have been ready to run but had no core; 0 where unknown."""
    total = 0
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/schedstat") as record:
                total += int(record.read().split()[1])
    return total


def undisturbed_sample(call: Callable[[], object], inner: int, patience_ms: float = PATIENCE_MS) -> tuple[float, bool]:
    """A sample during which other work took no core from us, or the least disturbed of those that took patience_ms
    together; and whether it was disturbed all the same."""
    found: list[tuple[float, float]] = []
    while sum(ms * inner for _, ms in found) <= patience_ms and len(found) < 200:
        before = waited_ns()
        ms = cpu_sample(call, inner)
        share = (waited_ns() - before) * 1e-6 / (ms * inner)
        found.append((share, ms))
        if share <= QUIET_SHARE:
            return ms, False
    return min(found)[1], True


def calibrate(call: Callable[[], object], warm_ms: float = 30.0) -> int:
    """Warms up, then returns the calls per CPU sample."""
    deadline = time.perf_counter() + warm_ms * 1e-3
    once = cpu_sample(call, 1)
    while time.perf_counter() < deadline:
        once = min(once, cpu_sample(call, 1))
    return max(1, min(100_000, round(SAMPLE_MS / max(once, 1e-5))))


class GpuClock:
    """Event timing with a flushed L2 and a full stream."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        l2 = int(getattr(properties, "L2_cache_size", 0) or 64 << 20)
        self._flush = torch.empty(max(4 * l2, 128 << 20), dtype=torch.int8, device=self.device)
        self._cycles_per_ms = self._measure_spin()
        self.starved = 0

    def _measure_spin(self) -> float:
        cycles = 4_000_000
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3):
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize(self.device)
        return cycles / max(begin.elapsed_time(end), 1e-3)

    def batch(self, call: Callable[[], object], count: int, host_ms: float) -> list[float]:
        """`count` samples in milliseconds; host_ms is what the host needs to queue one call."""
        spin_ms = min(_SPIN_LIMIT_MS, 0.3 + 1.5 * count * (host_ms + 0.05))
        for _ in range(4):
            samples, kept_full = self._queue(call, count, spin_ms)
            if kept_full:
                return samples
            spin_ms = min(_SPIN_LIMIT_MS, 2 * spin_ms)
        self.starved += 1
        return samples

    def _queue(self, call: Callable[[], object], count: int, spin_ms: float) -> tuple[list[float], bool]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        spun = torch.cuda.Event()
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(spin_ms * self._cycles_per_ms))
        spun.record()
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        kept_full = not spun.query()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs], kept_full

    def host_us(self, call: Callable[[], object], calls: int = 40, repeats: int = 5) -> float:
        """Microseconds the host is busy with one call (the device's work is only queued)."""
        costs = []
        for _ in range(repeats):
            torch.cuda.synchronize(self.device)
            costs.append(cpu_sample(call, calls) * 1e3)
        torch.cuda.synchronize(self.device)
        return median(costs)


def count_syncs(call: Callable[[], object]) -> int:
    """How often one call makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(w.message) for w in caught)


def count_launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that one call starts, as the profiler sees them; None where it cannot run."""
    from torch.profiler import ProfilerActivity, profile

    try:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    except RuntimeError:
        return None
    return sum(not getattr(e, "is_user_annotation", False) for e in events) or None


def roofline(device: str, dtype: str = "fp32", seconds: float = 0.5) -> dict[str, float]:
    """{"copy_gbs", "gemm_gflops"}: a large copy (bytes read + written) and a large matrix product, measured now."""
    from bench._case import DTYPES

    if device == "cpu":
        source = torch.ones(16 << 20)
        n = 1024
    else:
        source = torch.ones(256 << 20, device=device)
        n = 8192
    moved = 2 * source.numel() * source.element_size()
    copy_ms = _best(partial(torch.empty_like(source).copy_, source), device, seconds / 2)
    del source
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    b = torch.randn(n, n, device=device).to(DTYPES[dtype])
    c = torch.empty_like(a)
    gemm_ms = _best(partial(torch.mm, a, b, out=c), device, seconds / 2)
    return {"copy_gbs": moved / copy_ms * 1e-6, "gemm_gflops": 2 * n**3 / gemm_ms * 1e-6}


def _best(call: Callable[[], object], device: str, seconds: float) -> float:
    """Median of the faster half of the samples, in milliseconds."""
    samples = []
    clock = None if device == "cpu" else GpuClock()
    for _ in range(2):
        call()  # touches the pages of the output
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(samples) < 6:
        samples += clock.batch(call, 5, 0.05) if clock else [undisturbed_sample(call, 1, 20.0)[0]]
    return median(sorted(samples)[: (len(samples) + 1) // 2])


class quiet:
    """No garbage collection while samples are taken."""

    def __enter__(self) -> None:
        self._was = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was:
            gc.enable()
