"""nms_rotated on every backend against polygons that are clipped corner by corner, and its geometry by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _backends import backends_and_dtypes, backends_for
from _checks import assert_same_bits, check_cases, check_layouts, check_opcheck

from pydl import ops
from pydl.reference.nms_rotated import cases, nms_rotated, random_rotated, rotated_iou

OP = "nms_rotated"
NAN, INF = float("nan"), float("inf")
TORCH = ("torch",)
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}


def some(n, seed=0, extent=60.0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(random_rotated(rng, n, extent)).to(dtype), torch.from_numpy(rng.uniform(0, 1, n)).to(dtype)


def kept_by(backend, boxes, scores, threshold, idxs=None):
    args = [t if t is None else t.to(backend.device) for t in (boxes, scores, idxs)]
    kept = backend(*args[:2], threshold, args[2])
    assert kept.dtype == torch.int64 and kept.device == args[0].device
    return kept.cpu()


def assert_kept(backend, boxes, scores, threshold, idxs=None):
    wanted = nms_rotated(
        boxes.double().numpy(), scores.double().numpy(), threshold, None if idxs is None else idxs.numpy()
    )
    assert np.array_equal(kept_by(backend, boxes, scores, threshold, idxs).numpy(), wanted)


# values against the oracle


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    (case,) = (c for c in cases() if c.layouts)
    check_layouts(backend, dtype, case, levels=("values",))


@pytest.mark.parametrize("backend", backends_for(OP))
@pytest.mark.parametrize("threshold", [-0.5, 0.02, 0.3, 0.7, 1.0, NAN, INF], ids=str)
def test_thresholds(backend, threshold):
    assert_kept(backend, *some(70, extent=40), threshold)


@pytest.mark.parametrize("backend", backends_for(OP))
@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 257])
def test_sizes(backend, n):
    # one, around a word of bits, a multiple of all vectors, more than a chunk of 256 that is settled at once
    assert_kept(backend, *some(n, seed=n), 0.2)
    assert_kept(backend, *some(n, seed=n), 0.2, torch.arange(n) % 3 - 1)


@pytest.mark.parametrize("backend", backends_for(OP, without=TORCH))
def test_many_boxes(backend):
    # beyond what one block (2,048) or one thread (16,384) settles alone; most boxes go early, which spares the oracle
    n = 2100 if backend.slow else 16400
    boxes, scores = some(n, extent=20)
    assert_kept(backend, boxes, scores, 0.02)


def placed(box, turn):
    """The box after a turn of the whole plane by `turn` degrees and a shift: no IoU changes."""
    x, y, width, height, angle = box
    sine, cosine = np.sin(np.deg2rad(turn)), np.cos(np.deg2rad(turn))
    return [300 + x * cosine + y * sine, -200 - x * sine + y * cosine, width, height, angle + turn]


ROOT2 = 2**0.5
THIN = 1e-6 / np.sin(np.deg2rad(30))  # what bars of 1,000 x 0.001 that cross at 30 degrees have in common
CLOSED_FORMS = {
    "octagon": ([0, 0, 2, 2, 0], [0, 0, 2, 2, 45], 1 / ROOT2),
    "half a turn": ([0, 0, 5, 3, 20], [0, 0, 5, 3, 200], 1.0),
    "a whole turn": ([0, 0, 5, 3, 20], [0, 0, 5, 3, -340], 1.0),
    "sides swapped": ([0, 0, 5, 3, 20], [0, 0, 3, 5, 110], 1.0),
    "cross": ([0, 0, 10, 1, 0], [0, 0, 10, 1, 90], 1 / 19),
    "diamonds": ([0, 0, 2, 2, 45], [ROOT2, 0, 2, 2, 45], 1 / 7),
    "inside": ([0, 0, 4, 4, 0], [0.5, -0.25, 1, 2, 30], 1 / 8),
    "corner in a side": ([0, 0, 4, 4, 0], [2, 0, ROOT2, ROOT2, 45], 1 / 17),
    "thin": ([0, 0, 1000, 1e-3, 0], [0, 0, 1000, 1e-3, 30], THIN / (2 - THIN)),
    "side by side": ([0, 0, 4, 2, 0], [4, 0, 4, 2, 0], 0.0),
    "corners meet": ([0, 0, 2, 2, 45], [2 * ROOT2, 0, 2, 2, 45], 0.0),
    "bounds meet alone": ([0, 0, 10, 1, 45], [3, 3, 2, 2, 0], 0.0),
}


@pytest.mark.parametrize("backend", backends_for(OP))
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(backend, name):
    first, second, iou = CLOSED_FORMS[name]
    scores = torch.tensor([0.9, 0.8], dtype=torch.float64)
    for turn in (0.0, 17.0, 90.0, -133.0):
        pair = torch.tensor([placed(first, turn), placed(second, turn)], dtype=torch.float64)
        assert abs(float(rotated_iou(pair[0].numpy(), pair[1:].numpy())[0]) - iou) < 1e-11
        for boxes in (pair, pair.flip(0)):
            if iou > 0:
                assert kept_by(backend, boxes, scores, iou - 1e-11).tolist() == [0]
            assert kept_by(backend, boxes, scores, iou + 1e-11).tolist() == [0, 1]


@pytest.mark.parametrize("backend", backends_for(OP))
def test_iou_decides(backend):
    # pairs, each on both sides of its own IoU: the geometry is right to 1e-9 whatever the angles
    boxes, _ = some(60, extent=12)
    boxes[20:40, 4] = boxes[:20, 4] + torch.arange(20) % 4 * 90  # parallel sides
    boxes[40:50] = boxes[:10] + torch.tensor([0, 0, 0, 0, 360.0])  # the same box
    boxes[50:60, 2:4] = 0.01 * boxes[:10, 2:4]  # far smaller
    scores = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for i in range(20):
        for j in (20 + i, 40 + i % 10, 50 + i % 10, (i + 1) % 20):
            pair = boxes[[i, j]]
            iou = float(rotated_iou(pair[0].numpy(), pair[1:].numpy())[0])
            if iou > 1e-6:
                assert kept_by(backend, pair, scores, iou * (1 - 1e-9) - 1e-10).tolist() == [0], (i, j)
            assert kept_by(backend, pair, scores, iou * (1 + 1e-9) + 1e-10).tolist() == [0, 1], (i, j)
        if backend.slow and i == 9:
            break


@pytest.mark.parametrize("backend", backends_for(OP))
@pytest.mark.parametrize("turn", [0.0, 90.0, -90.0, 180.0, 450.0, -3600.0])
def test_right_angles_are_exact(backend, turn):
    # 4 x 2 in 4 x 4: half, exactly; turned with its box it stays half
    boxes = torch.tensor([[10.0, 20, 4, 4, turn], [10, 20, 4, 2, turn], [10, 20, 2, 4, turn + 90]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert kept_by(backend, boxes, scores, 0.5).tolist() == [0, 1]
    assert kept_by(backend, boxes, scores, float(np.nextafter(0.5, 0))).tolist() == [0]


@pytest.mark.parametrize("backend", backends_for(OP))
def test_convention_of_the_angle(backend):
    # 10 long and 1 thick at 45 degrees: counter-clockwise as seen, with y down, it passes (3, -3), and not (3, 3)
    bar = [0.0, 0.0, 10.0, 1.0, 45.0]
    boxes = torch.tensor([bar, [3.0, -3.0, 0.5, 0.5, 0.0], [3.0, 3.0, 0.5, 0.5, 0.0]])
    assert kept_by(backend, boxes, torch.tensor([0.9, 0.8, 0.7]), 0.01).tolist() == [0, 2]


@pytest.mark.parametrize("backend", backends_for(OP))
def test_angle_zero_is_plain_nms(backend):
    boxes, scores = some(120, extent=50)
    boxes = boxes.mul(4).round().div(4)
    boxes[:, 4] = 0
    half = boxes[:, 2:4] / 2
    corners = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], 1)
    for threshold in (0.0, 0.25, 0.5):
        assert torch.equal(kept_by(backend, boxes, scores, threshold), ops.nms(corners, scores, threshold))


@pytest.mark.parametrize("backend", backends_for(OP))
@pytest.mark.parametrize("threshold", [0.1, -0.1])
def test_odd_boxes_and_scores(backend, threshold):
    boxes, scores = some(80, extent=40)
    scores[3], scores[5], scores[7] = NAN, INF, -INF
    for column in range(5):
        boxes[10 + column, column], boxes[20 + column, column] = NAN, INF
    boxes[30:33, 2], boxes[33:36, 3] = -boxes[30:33, 2], 0
    assert_kept(backend, boxes, scores, threshold)
    huge = boxes[40:].clone()
    huge[:, :4] *= 1e160  # areas overflow
    assert len(kept_by(backend, huge, scores[40:], 0.1)) == 40
    huge[:, 4] = 1e13
    assert len(kept_by(backend, huge, scores[40:], 0.1)) == 40


@pytest.mark.parametrize("backend", backends_for(OP))
def test_sides_of_all_sizes(backend):
    # slivers, specks and boxes that hold all others
    rng = np.random.default_rng(6)
    boxes, scores = some(150, extent=40)
    boxes[:, 2:4] = torch.from_numpy(10.0 ** rng.uniform(-3, 3, (150, 2)))
    for threshold in (1e-3, 0.1):
        assert_kept(backend, boxes, scores, threshold)


@pytest.mark.parametrize("backend", backends_for(OP))
@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140], ids=str)
def test_scale_does_not_matter(backend, scale):
    boxes, scores = some(90, extent=40)
    near = kept_by(backend, boxes, scores, 0.2)
    boxes[:, :4] *= scale
    assert torch.equal(kept_by(backend, boxes, scores, 0.2), near)


@pytest.mark.parametrize("backend", backends_for(OP))
def test_coordinates_that_overflow_suppress_nothing(backend):
    most = 1.7e308
    boxes = torch.tensor(
        [[most, 0, most, 1e-9, 0], [-most, 0, most, 1e-9, 0], [most, 0, most, 1e-9, 45]], dtype=torch.float64
    )
    assert len(kept_by(backend, boxes, torch.ones(3), 0.5)) == 3


@pytest.mark.parametrize("backend", backends_for(OP, torch.float16))
def test_half_precision_is_widened(backend):
    # areas of 300 x 300 are no float16
    boxes = torch.tensor([[0.0, 0, 300, 300, 45], [9, 9, 300, 300, -45], [0, 0, 300, 300, 0]], dtype=torch.float16)
    scores = torch.tensor([0.5, 0.75, 0.25], dtype=torch.float16)
    assert kept_by(backend, boxes, scores, 0.8).tolist() == [1, 2]
    assert kept_by(backend, boxes, scores.double(), 0.5).tolist() == [1]


@pytest.mark.parametrize("backend", backends_for(OP))
def test_far_from_the_origin(backend):
    boxes, scores = some(100)
    near = kept_by(backend, boxes, scores, 0.3)
    boxes[:, :2] += 2.0**30
    assert torch.equal(kept_by(backend, boxes, scores, 0.3), near)


@pytest.mark.parametrize("backend", backends_for(OP))
def test_empty_ties_and_gradients(backend):
    device = backend.device
    assert backend(torch.zeros(0, 5, device=device), torch.zeros(0, device=device), 0.5).shape == (0,)
    boxes, _ = some(90)
    assert_kept(backend, boxes, torch.arange(90.0) % 3, 0.2)
    leaf = boxes.to(device).requires_grad_()
    assert not backend(leaf, leaf[:, 0].detach(), 0.2).requires_grad


@pytest.mark.parametrize("backend", backends_for(OP, without=TORCH))
def test_the_same_bits_on_every_run_and_thread_count(backend):
    boxes, scores = (t.to(backend.device) for t in some(300 if backend.slow else 17000, extent=200))
    before, first = torch.get_num_threads(), backend(boxes, scores, 0.3)
    try:
        for threads in (1, 2, 5) if backend.name == "cpu" else (before,) * 2:
            torch.set_num_threads(threads)
            assert_same_bits(backend(boxes, scores, 0.3), first)
    finally:
        torch.set_num_threads(before)


# errors, and torch's machinery


def test_errors():
    boxes, scores = some(5)
    with pytest.raises(RuntimeError, match=r"nms_rotated: argument 'boxes' must have shape \[N, 5\], got \[5, 4\]"):
        ops.nms_rotated(boxes[:, :4], scores, 0.5)
    with pytest.raises(RuntimeError, match=r"nms_rotated: argument 'scores' must have shape \[N\] = \[5\], got \[4\]"):
        ops.nms_rotated(boxes, scores[:4], 0.5)
    with pytest.raises(RuntimeError, match=r"nms_rotated: argument 'boxes' must be floating point, got torch.int64"):
        ops.nms_rotated(boxes.long(), scores, 0.5)
    with pytest.raises(TypeError, match=r"nms_rotated: argument 'iou_threshold' must be a number, got None"):
        ops.nms_rotated(boxes, scores, None)


@pytest.mark.parametrize("backend", backends_for(OP, without=TORCH))
def test_raw_operator_and_opcheck(backend):
    op = NAMESPACES[backend.name].nms_rotated
    boxes, scores = (t.to(backend.device) for t in some(20))
    with backend.use():
        for bad in (
            (boxes[:, :4], scores, None),
            (boxes[:, :4][:0], scores[:0], None),
            (boxes[0], scores, None),
            (boxes[None], scores[None], None),
            (boxes.long(), scores, None),
            (boxes, scores[:3], None),
            (boxes, scores.long(), None),
            (boxes, scores, scores),
            (boxes, scores, torch.arange(20, device=boxes.device, dtype=torch.int32)),
            (boxes, scores, torch.arange(19, device=boxes.device)),
        ):
            with pytest.raises(RuntimeError, match="nms_rotated: "):
                op(*bad, 0.5)
        check_opcheck(op, boxes, scores, None, 0.3)
        check_opcheck(op, boxes, scores, torch.arange(20, device=boxes.device) % 2, 0.3)


@pytest.mark.compile
@pytest.mark.parametrize("backend", backends_for(OP, without=TORCH))
def test_compiled_with_two_shapes(backend):
    def best(boxes, scores):
        return scores[ops.nms_rotated(boxes, scores, 0.3)] * 2

    with backend.use():
        torch._dynamo.reset()
        compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
        for n in (30, 41):
            args = [t.to(backend.device) for t in some(n)]
            assert_same_bits(compiled(*args), best(*args))
