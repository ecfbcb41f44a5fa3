"""Run-length encoding by its definition: walk down each column and count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pydl.reference._spec import Case, Spec


def _runs(column_major: np.ndarray) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for value in column_major.tolist():
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs


def _each(x: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    for place in np.ndindex(x.shape[:-2]):
        yield _runs(x[place].T.reshape(-1))


def _vector(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def rle_encode(masks):
    """(counts, lengths): runs of zeros and ones by turns, zeros first; one run of no zeros where there is no pixel."""
    counts, lengths = [], []
    for runs in _each(masks != 0):
        own = [count for _, count in runs]
        own = [0, *own] if not runs or runs[0][0] else own
        counts += own
        lengths.append(len(own))
    return _vector(counts), _vector(lengths).reshape(masks.shape[:-2])


def rle_encode_labels(labels):
    """(values, counts, lengths)."""
    every = list(_each(labels))
    flat = [run for runs in every for run in runs]
    lengths = _vector([len(runs) for runs in every]).reshape(labels.shape[:-2])
    return np.array([value for value, _ in flat], labels.dtype), _vector([count for _, count in flat]), lengths


def rle_decode_labels(values, counts, lengths, size):
    """Label maps [..., H, W]."""
    out, start = np.zeros((*lengths.shape, *size), dtype=values.dtype), 0
    for place in np.ndindex(lengths.shape):
        stop = start + int(lengths[place])
        pixels = [v for v, c in zip(values[start:stop].tolist(), counts[start:stop].tolist()) for _ in range(c)]
        out[place] = np.array(pixels, dtype=values.dtype).reshape(size[1], size[0]).T
        start = stop
    return out


def rle_decode(counts, lengths, size):
    """Masks [..., H, W]."""
    turns = _vector([i % 2 for place in np.ndindex(lengths.shape) for i in range(int(lengths[place]))])
    return rle_decode_labels(turns, counts, lengths, size).astype(bool)


def _masks() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(11)
    yield "noise", rng.random((3, 7, 5)) < 0.5
    disc = np.hypot(*(np.mgrid[:40, :33] - 16)) < 12
    yield "a disc", np.stack([disc, ~disc])
    yield "wide", rng.random((2, 5, 131)) < 0.3  # two blocks of 64 columns and a rest
    yield "stripes", np.arange(130)[None, :].repeat(9, 0) % 2 == 1  # every column starts a run at its top
    yield "checks", (np.arange(300)[:, None] + np.arange(65)) % 2 == 1  # every pixel starts one
    yield "nothing and everything", np.stack([np.zeros((4, 9), bool), np.ones((4, 9), bool)])
    yield "one mask", rng.random((6, 6)) < 0.3
    yield "one pixel", np.ones((1, 1), bool)
    yield "several dimensions", rng.random((2, 3, 4, 5)) < 0.5
    yield "no masks", np.zeros((0, 3, 4), bool)
    yield "no pixels", np.zeros((2, 0, 4), bool)


def encode_cases() -> Iterator[Case]:
    """Masks."""
    for name, masks in _masks():
        yield Case(name, (masks,), layouts=name == "noise")


def label_cases() -> Iterator[Case]:
    """Label maps with few and with many values, negative and beyond 32 bits."""
    rng = np.random.default_rng(12)
    yield Case("three labels", (rng.integers(0, 3, (2, 9, 11)),), layouts=True)
    yield Case("large", (rng.choice(np.array([-5, 2**40, 7]), (13, 4)),))
    yield Case("extreme", (np.array([[-(2**63), 2**63 - 1], [0, -1]]),))
    for dtype in (np.uint8, np.int8, np.int16, np.int32):
        yield Case(f"{np.dtype(dtype)}", (rng.integers(0, 4, (2, 5, 70)).astype(dtype),))
    yield Case("no pixels", (np.zeros((2, 0, 4), np.int64),))
    yield Case("no maps", (np.zeros((0, 3, 4), np.int64),))


def decode_cases() -> Iterator[Case]:
    """The counts of the same masks."""
    for name, masks in _masks():
        yield Case(name, (*rle_encode(masks), masks.shape[-2:]), layouts=name == "noise")
    zeros = _vector([0, 3, 0, 0, 2, 1, 0, 0])
    yield Case("runs of no pixels", (zeros, _vector([8]), (2, 3)))


def decode_label_cases() -> Iterator[Case]:
    """The runs of the same maps."""
    for case in label_cases():
        (labels,) = case.args
        yield Case(case.name, (*rle_encode_labels(labels), labels.shape[-2:]), layouts=case.layouts)
    yield Case("runs of no pixels", (_vector([5, 9, 9, 7, 5]), _vector([2, 0, 1, 3, 0]), _vector([5]), (3, 2)))


SPECS = tuple(
    Spec(name, "", function, None, cases, dtypes=("float32",))
    for name, function, cases in (
        ("rle_encode", rle_encode, encode_cases),
        ("rle_encode_labels", rle_encode_labels, label_cases),
        ("rle_decode", rle_decode, decode_cases),
        ("rle_decode_labels", rle_decode_labels, decode_label_cases),
    )
)
