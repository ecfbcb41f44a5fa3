"""Ops with arguments drawn at random, on every backend, against the oracles.

The cases of an op were thought of; these were not. Sizes are small and often 1, where shortcuts begin. The draws are
the same on every run; PYDL_TEST_DRAWS=20 takes twenty times as many.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from _backends import available

from pydl._problems import Problem, applicable, poisoned_memory
from pydl._verify import _Run, levels
from pydl.reference import Case
from pydl.reference import spec as spec_of

TIMES = int(os.environ.get("PYDL_TEST_DRAWS", "1"))
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 12)
CHANNELS = (1, 2, 3, 8, 16, 17)


class Draw:
    """Arguments of one call."""

    def __init__(self, seed: int) -> None:
        self.any = random.Random(seed)
        self.numbers = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        return self.numbers.standard_normal(shape)

    def image(self, dims: int) -> np.ndarray:
        batch, channels = self.any.choice((1, 1, 2, 3)), self.any.choice(CHANNELS)
        return self.normal(batch, channels, *(self.any.choice(SIZES) for _ in range(dims)))

    def maybe(self, make: Callable[[], object]) -> object:
        return make() if self.any.random() < 0.6 else None

    def parameters(self, *shape: int) -> tuple:
        """Weight and bias; without a weight torch's group norm has no gradient for a bias."""
        weight = self.maybe(lambda: self.normal(*shape))
        return weight, None if weight is None else self.maybe(lambda: self.normal(*shape))


def window(draw: Draw, sizes: tuple[int, ...], longest: int = 4) -> tuple:
    """kernel_size, stride, padding: no window is longer than the padded input."""
    kernel = tuple(draw.any.randint(1, min(4, n + longest)) for n in sizes)
    stride = draw.maybe(lambda: tuple(draw.any.randint(1, 4) for _ in sizes))
    return kernel, stride, tuple(draw.any.randint(max(0, (k - n + 1) // 2), k // 2) for k, n in zip(kernel, sizes))


def max_pool(dims: int, draw: Draw) -> Case:
    x = draw.image(dims)
    kernel, stride, padding = window(draw, x.shape[2:])
    if draw.any.random() < 0.3:  # only windows that lie inside: see the limits in README.md
        kernel, stride, _ = window(draw, x.shape[2:], 0)
        dilation = tuple(draw.any.randint(1, (n - 1) // (k - 1) if k > 1 else 2) for n, k in zip(x.shape[2:], kernel))
        return Case("", (x, kernel, stride, 0, dilation, False, draw.any.random() < 0.5))
    return Case("", (x, kernel, stride, padding, 1, draw.any.random() < 0.4, draw.any.random() < 0.5))


def avg_pool(dims: int, draw: Draw) -> Case:
    x = draw.image(dims)
    divisor = () if dims == 1 else (draw.maybe(lambda: draw.any.choice((1, 3, -2))),)
    flags = draw.any.random() < 0.4, draw.any.random() < 0.5
    # torch has no three-dimensional windows longer than the input
    return Case("", (x, *window(draw, x.shape[2:], 0 if dims == 3 else 4), *flags, *divisor))


def adaptive_pool(dims: int, draw: Draw) -> Case:
    x = draw.image(dims)
    even = draw.any.random() < 0.5  # parts of one length, or one part for each element or more
    sizes = [[o for o in SIZES if not even or n % o == 0 or o % n == 0] for n in x.shape[2:]]
    return Case("", (x, tuple(draw.any.choice(o if dims == 1 else [None, *o]) for o in sizes)))


def batch_norm(draw: Draw) -> Case:
    x = draw.image(draw.any.randint(0, 3))
    training = draw.any.random() < 0.5 and x.size > x.shape[1]
    channels = x.shape[1]
    # training updates them, which is tested elsewhere: here no input may change
    running = (None, None) if training else (draw.normal(channels), 0.5 + draw.numbers.random(channels))
    return Case("", (x, *running, *draw.parameters(channels), training, 0.3, draw.any.choice((1e-5, 1e-2))))


def group_norm(draw: Draw) -> Case:
    x = draw.image(draw.any.randint(1, 3))
    groups = draw.any.choice([g for g in (1, 2, 4, x.shape[1]) if x.shape[1] % g == 0])
    if x.size // x.shape[0] // groups < 3:  # of one or two values nothing but rounding is left
        x = np.concatenate([x] * 3, axis=-1) + draw.normal(*x.shape[:-1], 3 * x.shape[-1])
    tail = {} if draw.any.random() < 0.5 else {"activation": draw.any.choice(("silu", None))}
    return Case("", (x, groups, *draw.parameters(x.shape[1]), 1e-2), tail)


def local_response_norm(draw: Draw) -> Case:
    x = draw.image(draw.any.randint(1, 2))
    return Case("", (x, draw.any.randint(1, 7), draw.any.choice((1e-4, 0.5)), draw.any.choice((0.75, 0.5, 1.3)), 1.0))


def layer_norm(draw: Draw) -> Case:
    x = draw.image(draw.any.randint(1, 2))
    shape = x.shape[draw.any.randint(1, x.ndim - 1) :]
    return Case("", (x, shape, *draw.parameters(*shape), 1e-2))


def rms_norm(draw: Draw) -> Case:
    x, shape, weight, _, eps = layer_norm(draw).args
    return Case("", (x, shape, weight, eps))


def queries_keys_values(draw: Draw, shared: bool = False) -> tuple[np.ndarray, ...]:
    lengths = (1, 3, 17, 63, 64, 65, 129)
    batch, heads, group = draw.any.choice((1, 2)), draw.any.choice((1, 2)), draw.any.choice((1, 2)) if shared else 1
    rows, keys, d = draw.any.choice(lengths), draw.any.choice(lengths), draw.any.choice((1, 7, 8, 16, 33))
    q, k = draw.normal(batch, heads * group, rows, d), draw.normal(batch, heads, keys, d)
    return q, k, draw.normal(batch, heads, keys, draw.any.choice((d, 5)))


def scaled_dot_product_attention(draw: Draw) -> Case:
    q, k, v = queries_keys_values(draw)
    shape = tuple(draw.any.choice((1, n)) for n in q.shape[:3]) + (k.shape[2],)
    kind = draw.any.choice(("none", "causal", "mask", "bias"))
    mask = draw.numbers.random(shape) < 0.6 if kind == "mask" else draw.normal(*shape) if kind == "bias" else None
    return Case("", (q, k, v, mask, 0.0, kind == "causal"))


def attention(draw: Draw) -> Case:
    q, k, v = queries_keys_values(draw, shared=True)
    batch, heads, rows, keys = *q.shape[:3], k.shape[2]
    full = (batch, heads, rows, keys)
    makers: dict[str, Callable[[], object]] = {
        "mask": lambda: draw.numbers.random([draw.any.choice((1, n)) for n in full]) < 0.7,
        "bias": lambda: draw.normal(*(draw.any.choice((1, n)) for n in full)),
        "causal": lambda: draw.any.choice(("top_left", "bottom_right")),
        "window": lambda: (draw.any.choice((None, 0, 5, 70)), draw.any.choice((None, 0, 3, 70))),
        "key_lengths": lambda: draw.numbers.integers(0, keys + 1, batch),
        "key_padding": lambda: draw.numbers.random((batch, keys)) < 0.7,
        "segment_ids": lambda: (draw.numbers.integers(0, 3, (batch, rows)), draw.numbers.integers(0, 3, (batch, keys))),
        "softcap": lambda: 2.0,
        "return_lse": lambda: True,
    }
    chosen = draw.any.sample(sorted(makers), draw.any.randint(0, 3))
    return Case("", (q, k, v), {name: makers[name]() for name in chosen})


def roi(draw: Draw, channels: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A feature map, and boxes on the image that it was made of: inside, over its edges, and degenerate ones."""
    batch, height, width = draw.any.choice((1, 2, 3)), draw.any.choice(SIZES), draw.any.choice(SIZES)
    count = draw.any.choice((1, 2, 9))
    rows = draw.numbers.uniform(-2.0, height + 2.0, (count, 2)) / scale
    cols = draw.numbers.uniform(-2.0, width + 2.0, (count, 2)) / scale
    if draw.any.random() < 0.8:
        rows.sort(axis=1)
        cols.sort(axis=1)
    image = draw.numbers.integers(0, batch, count).astype(np.float64)
    boxes = np.column_stack([image, cols[:, 0], rows[:, 0], cols[:, 1], rows[:, 1]])
    return draw.normal(batch, channels, height, width), boxes


def roi_align(draw: Draw) -> Case:
    scale, bins = draw.any.choice((1.0, 0.25)), (draw.any.choice((1, 2, 7)), draw.any.choice((1, 3)))
    x, boxes = roi(draw, draw.any.choice(CHANNELS), scale)
    return Case("", (x, boxes, bins, scale, draw.any.choice((-1, 1, 2)), draw.any.random() < 0.5))


def ps_roi_align(draw: Draw) -> Case:
    scale, bins = draw.any.choice((1.0, 0.25)), (draw.any.choice((1, 2)), draw.any.choice((1, 3)))
    x, boxes = roi(draw, draw.any.choice((1, 3, 8)) * bins[0] * bins[1], scale)
    return Case("", (x, boxes, bins, scale, draw.any.choice((1, 2))))


def roi_pool(draw: Draw) -> Case:
    scale, bins = draw.any.choice((1.0, 0.25)), (draw.any.choice((1, 2, 7)), draw.any.choice((1, 3)))
    x, boxes = roi(draw, draw.any.choice(CHANNELS), scale)
    return Case("", (x, boxes, bins, scale))


def ctc_loss(draw: Draw) -> Case:
    frames, batch, classes = (
        draw.any.choice((1, 2, 9, 33, 70)),
        draw.any.choice((1, 2, 3)),
        draw.any.choice((2, 3, 9, 40)),
    )
    most, blank = draw.any.choice((0, 1, 5, 31, 33)), draw.any.randrange(classes)
    x = draw.normal(frames, batch, classes)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    labels = draw.numbers.integers(0, classes - 1, (batch, most))
    labels += labels >= blank
    lengths = [draw.any.randint(0, frames) for _ in range(batch)], [draw.any.randint(0, most) for _ in range(batch)]
    flat = draw.any.random() < 0.3  # one after the other
    targets = np.concatenate([row[:n] for row, n in zip(labels, lengths[1])]) if flat else labels
    return Case("", (x, targets, *map(tuple, lengths), blank, draw.any.choice(("none", "sum", "mean")), True))


def some_boxes(draw: Draw) -> np.ndarray:
    count = draw.any.choice((1, 2, 31, 32, 33, 64, 65, 130))
    center, half = draw.numbers.uniform(0, 60, (count, 2)), draw.numbers.uniform(0.5, 20, (count, 2))
    boxes = np.concatenate([center - half, center + half], -1)
    return boxes if draw.any.random() < 0.7 else np.round(boxes / 8) * 8  # many equal, some empty


def nms(draw: Draw) -> Case:
    boxes = some_boxes(draw)
    scores = draw.numbers.random(len(boxes))
    return Case(
        "", (boxes, scores if draw.any.random() < 0.7 else np.round(4 * scores) / 4, draw.any.choice((0.2113, 0.7071)))
    )


def batched_nms(draw: Draw) -> Case:
    boxes, scores, threshold = nms(draw).args
    return Case("", (boxes, scores, draw.numbers.integers(-1, 3, len(boxes)), threshold))


def box_iou(draw: Draw) -> Case:
    return Case("", (some_boxes(draw), some_boxes(draw)), gradients=False)


MAKERS: dict[str, Callable[[Draw], Case]] = {
    f"{kind}{dims}d": functools.partial(make, dims)
    for kind, make in (
        ("max_pool", max_pool),
        ("avg_pool", avg_pool),
        ("adaptive_max_pool", adaptive_pool),
        ("adaptive_avg_pool", adaptive_pool),
    )
    for dims in (1, 2, 3)
}
MAKERS |= {
    make.__name__: make
    for make in (
        batch_norm,
        group_norm,
        local_response_norm,
        layer_norm,
        rms_norm,
        scaled_dot_product_attention,
        attention,
        roi_align,
        ps_roi_align,
        roi_pool,
        ctc_loss,
        nms,
        batched_nms,
        box_iou,
    )
}


def differences(backend, problem: Problem, level: str) -> list[str]:
    """What is wrong with a call, but for rounding: beside a gradient that cancels to 0 no error is small."""
    with poisoned_memory():
        run = _Run(backend, problem, torch.device(backend.device), level)
    if run.error:
        return [run.error]
    found = [] if all(guard.intact() for guard in run.guards) else ["memory of or beside an input was written"]
    expected = [*problem.values, *(problem.gradients if level == "gradients" else ())]
    tolerance = 1e-10 if problem.dtype == torch.float64 else 1e-4
    for i, (got, exact) in enumerate(zip((*run.values, *run.gradients), expected, strict=True)):
        try:
            scale = max(1.0, float(np.abs(exact[np.isfinite(exact)]).max(initial=0)))
            torch.testing.assert_close(
                got.detach().cpu().double(),
                torch.from_numpy(exact).double(),
                rtol=0,
                atol=tolerance * scale,
                equal_nan=True,
            )
        except AssertionError as error:
            found.append(f"tensor {i}: {error}")
    return found


def parameters() -> list:
    return [
        pytest.param(backend, id=f"{name}-{backend}", marks=[pytest.mark.gpu] if backend.device == "cuda" else [])
        for name in MAKERS
        for backend in available(name)
        if backend.name != "torch"
    ]


@pytest.mark.parametrize("backend", parameters())
def test_values_and_gradients(backend):
    failed = []
    for seed in range(TIMES * {"triton": 8, "simt": 24}.get(backend.name, 60)):
        draw = Draw(seed)
        case = MAKERS[backend.op](draw)
        layout = draw.any.choice(("contiguous", "contiguous", *applicable(case)))
        dtype = draw.any.choice([d for d in backend.dtypes if d.itemsize >= 4])
        problem = Problem(spec_of(backend.op), case, dtype, layout)
        for level in levels(problem):
            for wrong in differences(backend, problem, level):
                shapes = [a.shape if isinstance(a, np.ndarray) else a for a in case.args], list(case.kwargs)
                failed.append(f"draw {seed}, {dtype}, {layout}, {shapes}, {level}: {wrong}")
    assert not failed, "\n".join(failed)
