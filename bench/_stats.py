"""Order statistics of samples, ratios of pairs, and the order in which providers take turns."""

from __future__ import annotations

from collections.abc import Sequence


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear-interpolated quantile, q in [0, 1]."""
    if not samples:
        raise ValueError("quantile: no samples")
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(samples: Sequence[float]) -> float:
    return quantile(samples, 0.5)


def pair_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of theirs[i] / ours[i]: both sides of each pair were measured in the same round, so drift cancels."""
    if len(theirs) != len(ours):
        raise ValueError(f"pair_ratio: {len(theirs)} samples against {len(ours)}")
    return median([t / o for t, o in zip(theirs, ours, strict=True)])


def turn_order(count: int, round_index: int) -> list[int]:
    """Order of providers in a round: rotated by one each round and reversed every other cycle, so that each
    provider follows each other one equally often."""
    order = [(i + round_index) % count for i in range(count)]
    return order[::-1] if (round_index // max(count, 1)) % 2 else order


def round_count(seconds: float, round_ms: float, least: int = 7, most: int = 400) -> int:
    """How many rounds fit into the time, within bounds."""
    return int(min(most, max(least, seconds * 1e3 / max(round_ms, 1e-6))))
