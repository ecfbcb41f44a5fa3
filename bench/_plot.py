"""The roofline plot: achieved rate over arithmetic intensity, one point per row, under the two measured roofs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def require() -> None:
    """Ends the program with a plain message when matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib, which is not installed (pip install matplotlib)")


def roofline(rows: Sequence[dict[str, Any]], environment: dict[str, Any], folder: Path) -> list[Path]:
    """Writes roofline-<device>-<dtype>.svg and .png for every dtype among the rows; returns the paths."""
    require()
    import matplotlib

    matplotlib.use("Agg")
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    timed = [r for r in rows if r["median_ms"] is not None and r["roof_share"] is not None]
    for dtype in dict.fromkeys(r["dtype"] for r in timed):
        chosen = [r for r in timed if r["dtype"] == dtype]
        written += _draw(chosen, environment, dtype, folder / f"roofline-{chosen[0]['device']}-{dtype}")
    return written


def _draw(rows: Sequence[dict[str, Any]], environment: dict[str, Any], dtype: str, stem: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    roof = environment["roofline"][dtype]
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    intensity = [r["flops"] / r["bytes"] for r in rows]
    ridge = roof["gemm_gflops"] / roof["copy_gbs"]
    low, high = min(intensity) / 4, max(ridge * 4, max(intensity) * 4)
    axes.plot(
        [low, ridge, high],
        [low * roof["copy_gbs"], roof["gemm_gflops"], roof["gemm_gflops"]],
        color="0.3",
        label=f"copy {roof['copy_gbs']:.0f} GB/s, matrix product {roof['gemm_gflops']:.0f} GFLOP/s",
    )
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    for i, op in enumerate(dict.fromkeys(r["op"] for r in rows)):
        for j, provider in enumerate(providers):
            points = [r for r in rows if r["op"] == op and r["provider"] == provider]
            axes.scatter(
                [r["flops"] / r["bytes"] for r in points],
                [r["flops"] / r["median_ms"] * 1e-6 for r in points],
                color=f"C{j}",
                marker="osD^vP*X"[i % 8],
                alpha=0.75,
                label=f"{op}, {provider}",
            )
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="flop per compulsory byte", ylabel="GFLOP/s")
    axes.set_title(f"{environment['device']}, {dtype}, torch {environment['torch']}", fontsize=10)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=7)
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
