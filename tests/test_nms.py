"""nms, batched_nms and nms_padded on every backend: exact equality with a greedy NumPy oracle in the same precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _backends import backends_and_dtypes, backends_for
from _checks import assert_same_bits, check_cases, check_layouts
from _nms import assert_kept, boxes_of, numpy

from pydl.reference.nms import batched_cases, nms, nms_cases, nms_padded, padded_cases, random_boxes

OPS = ("nms", "batched_nms", "nms_padded")
CASES = {"nms": nms_cases, "batched_nms": batched_cases, "nms_padded": padded_cases}
NAN, INF = float("nan"), float("inf")
TORCH = ("torch",)


def every(parameters, *args, **kwargs):
    """pytest parameters of all three functions."""
    return [
        pytest.param(*p.values, id=f"{op}-{p.id}", marks=p.marks) for op in OPS for p in parameters(op, *args, **kwargs)
    ]


# values against the oracle


@pytest.mark.parametrize(("backend", "dtype"), every(backends_and_dtypes))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.3, 0.5, 1.0, 2.0, NAN, INF, -INF], ids=str)
def test_thresholds(backend, dtype, threshold):
    # below 0 boxes that do not meet go too; at 0 any overlap is enough; from 1 on all stay
    boxes, scores = boxes_of(70, dtype, extent=60)
    assert_kept(backend, boxes, scores, threshold)


@pytest.mark.parametrize("backend", backends_for("nms"))
@pytest.mark.parametrize("n", [63, 64, 65, 127, 128, 129, 256, 257, 513])
def test_sizes_around_a_word_of_bits_and_a_block(backend, n):
    boxes, scores = boxes_of(n, seed=n)
    assert_kept(backend, boxes, scores, 0.4)


@pytest.mark.parametrize("backend", backends_for("nms", without=TORCH))
def test_many_boxes(backend):
    # beyond what one block (2,048) or one thread (16,384) settles alone; the runner of CUDA sources is slow
    for n, extent in ((2049, 150), (4097, 250)) if backend.slow else ((17001, 150), (16384, 100)):
        boxes, scores = boxes_of(n, extent=extent)
        assert_kept(backend, boxes, scores, 0.5)


@pytest.mark.parametrize("backend", backends_for("batched_nms", without=TORCH))
def test_large_classes_among_small_ones(backend):
    # two classes that several blocks or threads share, 80 of one box, and as many as there are boxes
    n = 4300 if backend.slow else 33500
    boxes, scores = boxes_of(n, extent=100)
    idxs = torch.arange(n) % 2 - 7
    idxs[:80] = torch.arange(80) * 10**15
    assert_kept(backend, boxes, scores, 0.5, idxs)
    few = [t[:2200] for t in (boxes, scores, torch.arange(n) // 2)]
    assert_kept(backend, few[0], few[1], 0.1, few[2])


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
def test_boxes_just_above_the_threshold(backend, dtype):
    # torchvision's own construction: the last box overlaps the best one by a little more than the threshold
    for threshold in (0.2, 0.5, 0.8):
        boxes, scores = boxes_of(100, torch.float64, seed=7)
        best = int(scores.argmax())
        x1, y1, x2, y2 = boxes[best].tolist()
        x2 += (x2 - x1) * (1 / (threshold + 1e-2) - 1)
        boxes[-1] = torch.tensor([x1, y1, x2, y2])
        scores[-1] = scores[best] - 1e-3
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        assert_kept(backend, boxes, scores, threshold)
        kept = backend(boxes.to(backend.device), scores.to(backend.device), threshold).tolist()
        assert best in kept and len(boxes) - 1 not in kept


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
def test_iou_exactly_at_the_threshold_stays(backend, dtype):
    # IoU with the first: 3/5, 1/2, 1/4; of the last two with each other: 1/2
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 0, 5, 4], [0, 0, 4, 2], [0, 0, 2, 2]], dtype=dtype)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=dtype)
    for threshold, kept in ((0.5, [0, 2, 3]), (0.25, [0, 3]), (0.125, [0]), (0.625, [0, 1, 2, 3])):
        assert_kept(backend, boxes, scores, threshold)
        assert backend(boxes.to(backend.device), scores.to(backend.device), threshold).tolist() == kept


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
def test_every_quotient_of_small_integers_against_its_own_threshold(backend, dtype):
    # IoU = a / b for rows of unit squares: a of b in common; the threshold is the quotient rounded to float64, which
    # float32 rounds to either side of
    for b in range(2, 14):
        for a in range(1, b):
            boxes = torch.tensor([[0.0, 0, b, 1], [0, 0, a, 1]], dtype=dtype)
            scores = torch.tensor([2.0, 1.0], dtype=dtype)
            near = np.float32(a / b)
            for threshold in (a / b, np.nextafter(a / b, 0), near, np.nextafter(near, np.float32(0))):
                assert_kept(backend, boxes, scores, float(threshold))
        if backend.slow:
            break


# ties, NaN, infinities, odd boxes


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
def test_ties_keep_their_order(backend, dtype):
    boxes, _ = boxes_of(150, dtype)
    for scores in (torch.zeros(150), torch.arange(150) % 3, -((torch.arange(150) % 2) * 0.0)):  # zeros of both signs
        assert_kept(backend, boxes, scores.to(dtype), 0.3)
    apart = torch.arange(40.0).mul(10)[:, None] + torch.tensor([0.0, 0, 5, 5])
    kept = backend(apart.to(backend.device, dtype), torch.ones(40, device=backend.device, dtype=dtype), 0.5)
    assert kept.tolist() == list(range(40))


@pytest.mark.parametrize("backend", backends_for("nms"))
@pytest.mark.parametrize("n", [1, 33, 300])
def test_identical_boxes(backend, n):
    boxes = torch.tensor([[3.0, 4, 8, 9]]).expand(n, 4)
    scores = torch.linspace(0, 1, n)
    assert_kept(backend, boxes, scores, 0.5)
    assert backend(boxes.to(backend.device), scores.to(backend.device), 0.99).tolist() == [n - 1]
    assert len(backend(boxes.to(backend.device), scores.to(backend.device), 1.0)) == n


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
@pytest.mark.parametrize("threshold", [0.0, 0.5, -0.5])
def test_nan_and_infinite_scores_and_boxes(backend, dtype, threshold):
    boxes, scores = boxes_of(90, dtype, extent=50)
    scores[[3, 40, 41]], scores[[5, 60]], scores[[7, 61]] = NAN, INF, -INF
    assert_kept(backend, boxes, scores, threshold)
    assert backend(boxes.to(backend.device), scores.to(backend.device), 1.0)[:3].tolist() == [3, 40, 41]
    boxes[10, 0], boxes[11, 3], boxes[12] = NAN, NAN, NAN
    boxes[20, 2], boxes[21, 0], boxes[22, :2] = INF, -INF, -INF
    boxes[23] = torch.tensor([-INF, -INF, INF, INF])
    boxes[24] = torch.tensor([INF, 0, INF, 9])
    assert_kept(backend, boxes, scores, threshold)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
@pytest.mark.parametrize("threshold", [0.0, 0.3, -0.1])
def test_inverted_negative_and_degenerate_boxes(backend, dtype, threshold):
    boxes, scores = boxes_of(120, dtype, extent=50)
    boxes -= 40
    boxes[::5] = boxes[::5][:, [2, 1, 0, 3]]  # one side reversed: a negative area
    boxes[1::7] = boxes[1::7][:, [2, 3, 0, 1]]  # both: a positive one
    boxes[2::9, 2] = boxes[2::9, 0]  # no width
    boxes[3::11] = boxes[3].clone()[[0, 1, 0, 1]]  # the same point, many times: IoU 0 / 0
    assert_kept(backend, boxes, scores, threshold)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("nms"))
@pytest.mark.parametrize("scale", [1e-30, 1e-21, 3e-23, 1e-19, 1e15, 3e18, 6e18, 1e19], ids=str)
def test_areas_that_under_or_overflow_float32(backend, dtype, scale):
    if dtype in (torch.float16,):
        scale = 2.0**-20 if scale < 1 else 400.0  # subnormal sides, and areas beyond the largest number of the dtype
    if dtype == torch.float64:
        scale = scale**8
    boxes, scores = boxes_of(100, torch.float64, extent=40)
    boxes = (boxes * scale).to(dtype)
    for threshold in (0.0, 1e-30, 0.3, 0.6):
        assert_kept(backend, boxes, scores.to(dtype), threshold)


@pytest.mark.parametrize("backend", backends_for("nms"))
def test_far_from_the_origin_and_of_all_sizes(backend):
    # coordinates coarser than boxes, one box far away from all others, sides from 1e-3 to 1e3
    rng = np.random.default_rng(5)
    boxes, scores = boxes_of(200, torch.float64, extent=60)
    assert_kept(backend, (boxes + 2e6).float(), scores.float(), 0.4)
    assert_kept(backend, torch.cat([boxes, boxes[:1] + 1e9]).float(), torch.cat([scores, scores[:1]]).float(), 0.4)
    center, side = rng.uniform(0, 100, (200, 2)), 10 ** rng.uniform(-3, 3, (200, 2))
    assert_kept(
        backend, torch.from_numpy(np.concatenate([center - side, center + side], 1)).float(), scores.float(), 0.1
    )


@pytest.mark.parametrize("backend", backends_for("nms", torch.float16))
def test_half_precision_is_widened(backend):
    # areas of 300 x 300 are no float16
    boxes = torch.tensor([[0.0, 0, 300, 300], [10, 10, 310, 310], [500, 500, 900, 900]], dtype=torch.float16)
    scores = torch.tensor([0.5, 0.75, 0.25], dtype=torch.float16)
    assert backend(boxes.to(backend.device), scores.to(backend.device), 0.5).tolist() == [1, 2]


@pytest.mark.parametrize("backend", backends_for("nms"))
def test_scores_of_another_dtype(backend):
    boxes, scores = boxes_of(60)
    for kind in (torch.float64, torch.bfloat16):
        assert_kept(backend, boxes.half(), scores.to(kind), 0.5)


# classes


@pytest.mark.parametrize("backend", backends_for("batched_nms"))
@pytest.mark.parametrize("classes", [1, 2, 80, 1000])
def test_classes(backend, classes):
    boxes, scores = boxes_of(400, extent=70)
    idxs = torch.from_numpy(np.random.default_rng(3).integers(0, classes, 400))
    assert_kept(backend, boxes, scores, 0.4, idxs)
    for other in (idxs.to(torch.int32), (idxs % 100).to(torch.uint8)):
        assert_kept(backend, boxes, scores, 0.4, other)
    assert_kept(backend, boxes, scores, 0.4, (idxs - 1) * 2**61)  # any 64 bits are a class


@pytest.mark.parametrize("backend", backends_for("batched_nms"))
def test_a_class_equals_a_call_of_its_own(backend):
    boxes, scores = boxes_of(200, extent=70)
    boxes -= 60  # an offset on coordinates would go wrong below zero
    idxs = torch.arange(200) % 3
    kept = backend(boxes.to(backend.device), scores.to(backend.device), idxs.to(backend.device), 0.4).cpu()
    parts = [torch.nonzero(idxs == c)[:, 0] for c in range(3)]
    alone = torch.cat([part[torch.from_numpy(nms(boxes[part].numpy(), scores[part].numpy(), 0.4))] for part in parts])
    assert sorted(kept.tolist()) == sorted(alone.tolist())
    assert (scores[kept].diff() <= 0).all()


# batches of fixed size


def assert_padded(backend, boxes, scores, threshold, most, score_threshold, idxs):
    args = [None if t is None else t.to(backend.device) for t in (boxes, scores, idxs)]
    indices, counts = backend(*args[:2], threshold, most, score_threshold, args[2])
    arrays = [None if t is None else numpy(t) for t in (boxes, scores, idxs)]
    wanted = nms_padded(*arrays[:2], threshold, most, score_threshold, arrays[2])
    assert indices.dtype == counts.dtype == torch.int64 and indices.device == counts.device == args[0].device
    assert np.array_equal(indices.cpu().numpy(), wanted[0]) and np.array_equal(counts.cpu().numpy(), wanted[1])


@pytest.mark.parametrize("backend", backends_for("nms_padded"))
@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("most", [0, 1, 9, 100])
def test_padded_ragged_images(backend, classes, most):
    rng = np.random.default_rng(11)
    boxes = torch.from_numpy(random_boxes(rng, 4, 70, extent=50)).float()
    scores = torch.from_numpy(rng.uniform(0, 1, (4, 70))).float()
    scores[1, 30:], scores[2], scores[3, ::2] = -INF, -INF, NAN
    idxs = None if classes is None else torch.from_numpy(rng.integers(0, classes, (4, 70)))
    for score_threshold in (None, -INF, 0.5):
        args = [t if t is None else t.to(backend.device) for t in (boxes, scores, idxs)]
        indices, counts = backend(*args[:2], 0.4, most, score_threshold, args[2])
        wanted = nms_padded(
            numpy(boxes), numpy(scores), 0.4, most, score_threshold, None if idxs is None else idxs.numpy()
        )
        assert np.array_equal(indices.cpu().numpy(), wanted[0]) and np.array_equal(counts.cpu().numpy(), wanted[1])


@pytest.mark.parametrize("backend", backends_for("nms_padded", without=TORCH))
def test_padded_large_images(backend):
    n = 2100 if backend.slow else 5000
    rng = np.random.default_rng(12)
    boxes = torch.from_numpy(random_boxes(rng, 2, n, extent=4 * n**0.5)).float()
    scores = torch.from_numpy(rng.uniform(0, 1, (2, n))).float()
    idxs = torch.from_numpy(rng.integers(0, 2, (2, n)))
    for classes, most in ((None, n + 5), (None, 50), (idxs, n), (idxs, 50)):
        assert_padded(backend, boxes, scores, 0.5, most, 0.25, classes)


# layouts, edges, determinism


@pytest.mark.parametrize(("backend", "dtype"), every(backends_and_dtypes, without=TORCH))
def test_layouts(backend, dtype):
    (case,) = (c for c in CASES[backend.op]() if c.layouts)
    check_layouts(backend, dtype, case, levels=("values",))


@pytest.mark.parametrize("backend", backends_for("nms"))
def test_empty_and_single(backend):
    device = backend.device
    kept = backend(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5)
    assert kept.shape == (0,) and kept.dtype == torch.int64
    assert backend(torch.ones(1, 4, device=device), torch.zeros(1, device=device), -1.0).tolist() == [0]


@pytest.mark.parametrize("backend", backends_for("nms"))
def test_inputs_with_a_gradient(backend):
    boxes, scores = (t.to(backend.device).requires_grad_() for t in boxes_of(40))
    kept = backend(boxes, scores, 0.5)
    assert not kept.requires_grad
    assert scores[kept].sum().requires_grad


@pytest.mark.parametrize("backend", backends_for("batched_nms", without=TORCH))
def test_the_same_bits_on_every_run_and_thread_count(backend):
    n = 600 if backend.slow else 9000
    boxes, scores = boxes_of(n, extent=8 * n**0.5)
    idxs = torch.arange(n) % 2
    args = [t.to(backend.device) for t in (boxes, scores, idxs)]
    before = torch.get_num_threads()
    first = backend(*args, 0.5)
    try:
        for threads in (1, 2, 5) if backend.name == "cpu" else (before,) * 2:
            torch.set_num_threads(threads)
            assert_same_bits(backend(*args, 0.5), first)
    finally:
        torch.set_num_threads(before)
