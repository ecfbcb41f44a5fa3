"""soft_nms and matrix_nms on every backend: lowered scores and their order against the papers' formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _backends import backends_and_dtypes, backends_for
from _checks import assert_same_bits, check_cases, check_layouts, check_opcheck
from _nms import boxes_of, numpy

from pydl import ops
from pydl.reference.soft_nms import matrix_cases, matrix_nms, soft_cases, soft_nms

OPS = ("soft_nms", "matrix_nms")
CASES = {"soft_nms": soft_cases, "matrix_nms": matrix_cases}
NAN, INF = float("nan"), float("inf")
TORCH = ("torch",)
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}


def every(parameters, *args, **kwargs):
    """pytest parameters of both functions."""
    found = [(op, p) for op in OPS for p in parameters(op, *args, **kwargs)]
    return [pytest.param(*p.values, id=f"{op}-{p.id}", marks=p.marks) for op, p in found]


def assert_soft(backend, boxes, scores, *args, exact=True, idxs=None):
    """Order and scores are the oracle's: to the bit where no exponential is involved."""
    device = backend.device
    classes = None if idxs is None else idxs.to(device)
    indices, lowered = backend(boxes.to(device), scores.to(device), *args, idxs=classes)
    wanted = soft_nms(numpy(boxes), numpy(scores), *args, idxs=None if idxs is None else idxs.numpy())
    assert indices.dtype == torch.int64 and lowered.dtype == scores.dtype
    assert np.array_equal(indices.cpu().numpy(), wanted[0])
    if exact:
        assert torch.equal(lowered.cpu(), torch.from_numpy(wanted[1]).to(scores.dtype))
    else:
        torch.testing.assert_close(lowered.cpu(), torch.from_numpy(wanted[1]).to(scores.dtype))


# values against the oracle


@pytest.mark.parametrize(("backend", "dtype"), every(backends_and_dtypes))
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), every(backends_and_dtypes, without=TORCH))
def test_layouts(backend, dtype):
    (case,) = (c for c in CASES[backend.op]() if c.layouts)
    check_layouts(backend, dtype, case, levels=("values",))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("soft_nms"))
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 0.9])
def test_linear_scores_are_exact(backend, dtype, threshold):
    # crowded: most boxes leave early, so that gaps are closed again and again
    boxes, scores = boxes_of(150, dtype, extent=45)
    assert_soft(backend, boxes, scores, threshold)
    assert_soft(backend, boxes, scores, threshold, 0.5, 0.3, idxs=torch.arange(150) % 3)


@pytest.mark.parametrize("backend", backends_for("soft_nms"))
@pytest.mark.parametrize("n", [31, 32, 33, 257, 1030])  # a warp, a vector, more than a block's threads
def test_sizes(backend, n):
    if backend.name != "cpu" and n > 300:
        scores = torch.linspace(0, 1, n)  # few rounds: a low score leaves at once
        assert_soft(backend, boxes_of(n)[0], scores, 0.3, 0.5, 0.97)
        return
    boxes, scores = boxes_of(n, seed=n)
    assert_soft(backend, boxes, scores)
    assert_soft(backend, boxes, scores, 0.3, 0.4, 0.01, "gaussian", exact=False)


@pytest.mark.parametrize("backend", backends_for("soft_nms"))
def test_of_equal_scores_the_first_is_taken(backend):
    boxes = torch.arange(80.0).mul(10)[:, None] + torch.tensor([0.0, 0, 5, 5])
    scores = (torch.arange(80) % 3 + 1) / 4
    indices, lowered = backend(boxes.to(backend.device), scores.to(backend.device))
    assert indices.tolist() == sorted(range(80), key=lambda i: (-float(scores[i]), i))
    assert torch.equal(lowered.cpu(), scores[indices.cpu()])


@pytest.mark.parametrize("backend", backends_for("soft_nms"))
def test_odd_scores_and_boxes(backend):
    boxes, scores = boxes_of(90, extent=40)
    scores[[3, 40]], scores[[5, 60]], scores[[7, 61]] = NAN, INF, -INF
    boxes[10, 0], boxes[11] = NAN, NAN
    boxes[20, 2], boxes[21, 0] = INF, -INF
    boxes[22], boxes[23] = boxes[22, [2, 1, 0, 3]], boxes[23, [2, 3, 0, 1]]
    boxes[24:27] = boxes[24, [0, 1, 0, 1]]
    for score_threshold in (0.01, -INF, NAN, INF):
        assert_soft(backend, boxes, scores, 0.2, 0.5, score_threshold)
    assert_soft(backend, boxes, -scores.abs(), 0.2, 0.5, -INF)  # negative scores rise when they are lowered
    assert_soft(backend, boxes, torch.full((90,), -INF), 0.2, 0.5, -INF)
    assert_soft(backend, boxes, scores, 0.2, 0.5, 0.01, "gaussian", exact=False)


@pytest.mark.parametrize("backend", backends_for("matrix_nms"))
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_matrix_of_odd_scores_and_boxes(backend, method):
    boxes, scores = boxes_of(70, extent=60)
    scores[3], scores[5], scores[7] = NAN, INF, -INF
    boxes[10, 0], boxes[20, 2] = NAN, INF
    boxes[22] = boxes[22, [2, 1, 0, 3]]
    boxes[24:27] = boxes[24, [0, 1, 0, 1]]
    boxes[30:33] = boxes[30].clone()
    for idxs in (None, torch.arange(70) % 2):
        classes = None if idxs is None else idxs.to(backend.device)
        lowered = backend(boxes.to(backend.device), scores.to(backend.device), classes, 2.0, method)
        arrays = (numpy(boxes), numpy(scores), None if idxs is None else idxs.numpy())
        wanted = torch.from_numpy(matrix_nms(*arrays, 2.0, method)).float()
        torch.testing.assert_close(lowered.cpu(), wanted, equal_nan=True)


@pytest.mark.parametrize("backend", backends_for("matrix_nms"))
def test_matrix_by_hand(backend):
    # the third box overlaps the second alone, which the first lowers: exp(-2 (o23^2 - o12^2))
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [3, 0, 7, 4], [3, 9, 7, 13]], device=backend.device)
    scores = torch.tensor([0.5, 0.75, 1.0, 0.25], device=backend.device)
    lowered = backend(boxes, scores)
    second = 0.75 * np.exp(-2 * (12 / 20) ** 2)
    first = 0.5 * min(np.exp(-2 * ((8 / 24) ** 2 - (12 / 20) ** 2)), np.exp(-2 * (4 / 28) ** 2), 1)
    assert lowered.tolist() == pytest.approx([first, second, 1.0, 0.25], rel=1e-6)


@pytest.mark.parametrize("backend", backends_for("soft_nms", without=TORCH))
def test_the_same_bits_on_every_run(backend):
    boxes, scores = (t.to(backend.device) for t in boxes_of(200))
    for method in ("linear", "gaussian"):
        runs = [backend(boxes, scores, method=method) for _ in range(3)]
        for again in runs[1:]:
            for a, b in zip(runs[0], again, strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_matrix_with_every_number_of_threads(threads):
    boxes, scores = boxes_of(700)
    before = torch.get_num_threads()
    wanted = ops.matrix_nms(boxes, scores)
    try:
        torch.set_num_threads(threads)
        assert_same_bits(ops.matrix_nms(boxes, scores), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", backends_for("soft_nms"))
def test_scores_of_another_dtype(backend):
    boxes, scores = boxes_of(60)
    indices, lowered = backend(boxes.half().to(backend.device), scores.double().to(backend.device))
    wanted = soft_nms(boxes.half().double().numpy(), scores.double().numpy())
    assert lowered.dtype == torch.float64 and np.array_equal(indices.cpu().numpy(), wanted[0])
    assert np.array_equal(lowered.cpu().numpy(), wanted[1])


# errors, and torch's machinery


def test_errors():
    boxes, scores = boxes_of(5)
    with pytest.raises(ValueError, match=r"soft_nms: argument 'method' must be 'linear' or 'gaussian', got 'hard'"):
        ops.soft_nms(boxes, scores, method="hard")
    with pytest.raises(ValueError, match=r"soft_nms: argument 'sigma' must be above 0, got -1"):
        ops.soft_nms(boxes, scores, sigma=-1)
    with pytest.raises(ValueError, match=r"matrix_nms: argument 'sigma' must be above 0, got nan"):
        ops.matrix_nms(boxes, scores, sigma=NAN)
    with pytest.raises(TypeError, match=r"soft_nms: argument 'score_threshold' must be a number, got None"):
        ops.soft_nms(boxes, scores, score_threshold=None)
    with pytest.raises(RuntimeError, match=r"soft_nms: argument 'boxes' must have shape \[N, 4\], got \[5, 3\]"):
        ops.soft_nms(boxes[:, :3], scores)
    with pytest.raises(RuntimeError, match=r"matrix_nms: argument 'idxs' must be integers, got torch.float32"):
        ops.matrix_nms(boxes, scores, scores)
    with pytest.raises(RuntimeError, match=r"matrix_nms: argument 'scores' must have shape \[N\] = \[2\], got \[5\]"):
        ops.matrix_nms(torch.ones(2, 3, 3), scores)


@pytest.mark.parametrize("backend", backends_for("soft_nms", without=TORCH))
def test_raw_operators_check_what_they_read(backend):
    namespace = NAMESPACES[backend.name]
    boxes, scores = (t.to(backend.device) for t in boxes_of(5))
    bad = [(boxes[:, :3], scores, None), (boxes[0], scores, None), (boxes, scores[:3], None)]
    bad += [(boxes, scores, scores.int()), (boxes, scores.long(), None), (boxes[None], scores[None], None)]
    with backend.use():
        for args in bad:
            with pytest.raises(RuntimeError, match="soft_nms: "):
                namespace.soft_nms(*args, 0.3, 0.5, 0.1, False)
            with pytest.raises(RuntimeError, match="matrix_nms: "):
                namespace.matrix_nms(*args, 2.0, True)


@pytest.mark.parametrize("backend", backends_for("soft_nms", without=TORCH))
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    boxes, scores = (t.to(backend.device) for t in boxes_of(20))
    idxs = torch.arange(20, device=boxes.device) % 2
    with backend.use():
        check_opcheck(namespace.soft_nms, boxes, scores, None, 0.3, 0.5, 0.01, False)
        check_opcheck(namespace.soft_nms, boxes, scores, idxs, 0.3, 0.5, 0.01, True)
        check_opcheck(namespace.matrix_nms, boxes, scores, idxs, 2.0, True)


@pytest.mark.compile
@pytest.mark.parametrize("backend", backends_for("soft_nms", without=TORCH))
def test_compiled_with_two_shapes(backend):
    def both(boxes, scores):
        indices, lowered = ops.soft_nms(boxes, scores)
        return boxes[indices] * lowered[:, None], ops.matrix_nms(boxes, scores) * 2

    with backend.use():
        torch._dynamo.reset()
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        for n in (30, 41):
            args = [t.to(backend.device) for t in boxes_of(n)]
            for a, b in zip(compiled(*args), both(*args), strict=True):
                assert_same_bits(a, b)
