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


def another_round(done: int, elapsed: float, seconds: float) -> bool:
    """Whether to go on: while there is time, up to 400 rounds; 7 rounds also where that takes up to twice the time
    (samples of long calls, or samples repeated on a disturbed machine), and 3 in any case."""
    if done < 3:
        return True
    return elapsed < (2 * seconds if done < 7 else seconds) and done < 400
