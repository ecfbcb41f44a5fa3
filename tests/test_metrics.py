"""pydl.metrics: average precision by hand, by brute force, and beside pycocotools."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch

from pydl.metrics import mean_average_precision

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def entry(boxes, labels, scores=None):
    found = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}
    return found if scores is None else found | {"scores": torch.tensor(scores, dtype=torch.float32)}


A, B, FAR = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]


def test_by_hand():
    truth = [entry([A, B], [1, 1])]
    # best first: hit, duplicate, hit: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    found = [entry([A, A, B], [1, 1, 1], [0.9, 0.8, 0.7])]
    assert mean_average_precision(found, truth).map == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert mean_average_precision(found, truth, interpolation="voc07").map == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert mean_average_precision(found, truth, interpolation="101-point").map == pytest.approx((51 + 50 * 2 / 3) / 101)
    wrong_class = [entry([A, B], [1, 2], [0.9, 0.8])]
    result = mean_average_precision(wrong_class, truth)
    assert result.map == pytest.approx(0.5) and list(result.per_class) == [1]
    assert mean_average_precision([entry([FAR], [1], [0.9])], truth).map == 0.0
    assert mean_average_precision([entry([], [], [])], truth).map == 0.0


@pytest.mark.parametrize(("match", "expected"), [(">=", 1.0), (">", 0.0)])
def test_an_overlap_of_exactly_the_threshold(match, expected):
    # 10 x 10 against its left half: IoU 1/2
    result = mean_average_precision([entry([[0, 0, 5, 10]], [0], [1.0])], [entry([A], [0])], match=match)
    assert result.map == expected


def test_classes_without_truth_do_not_count():
    result = mean_average_precision([entry([A, B], [3, 7], [0.5, 0.9])], [entry([A], [3])])
    assert result.map == 1.0 and result.per_threshold == {0.5: 1.0} and result.table == {(0.5, 3): 1.0}
    assert np.isnan(mean_average_precision([entry([A], [0], [1.0])], [entry([], [])]).map)
    assert np.isnan(mean_average_precision([], []).map)


def scenes(seed, images=12, classes=4, grid=False):
    """True boxes and detections around them, some doubled, some stray; with `grid` coordinates and scores tie."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        n = int(rng.integers(0, 6))
        corner, side = rng.uniform(0, 80, (n, 2)), rng.uniform(8, 40, (n, 2))
        boxes, labels = np.concatenate([corner, corner + side], 1), rng.integers(0, classes, n)
        copies = rng.integers(0, n, 2 * n) if n else np.zeros(0, dtype=int)
        moved = boxes[copies] + rng.normal(0, 3, (len(copies), 4))
        stray = rng.uniform(0, 60, (3, 2))
        detections = np.concatenate([moved, np.concatenate([stray, stray + rng.uniform(5, 40, (3, 2))], 1)])
        kinds = np.concatenate([labels[copies], rng.integers(0, classes, 3)])
        scores = rng.uniform(0, 1, len(detections))
        if grid:
            boxes, detections, scores = 10 * np.round(boxes / 10), 10 * np.round(detections / 10), scores.round(1)
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 10)
            detections[:, 2:] = np.maximum(detections[:, 2:], detections[:, :2] + 10)
        truth.append(entry(boxes, labels))
        found.append(entry(detections, kinds, scores))
    return found, truth


def coco(found, truth, thresholds):
    """pycocotools' mAP at these thresholds, over all sizes and 100 detections."""
    api = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    boxes, detections = [], []
    for i, (f, t) in enumerate(zip(found, truth, strict=True), 1):
        for box, label in zip(t["boxes"].double().tolist(), t["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            boxes.append({"id": len(boxes) + 1, "image_id": i, "category_id": label + 1, **size})
        columns = (f["boxes"].double().tolist(), f["labels"].tolist(), f["scores"].double().tolist())
        for (x1, y1, x2, y2), label, score in zip(*columns, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            detections.append({"image_id": i, "category_id": label + 1, "bbox": box, "score": score})
    labels = sorted({b["category_id"] for b in boxes})
    with contextlib.redirect_stdout(io.StringIO()):
        data = api.COCO()
        images = [{"id": i + 1} for i in range(len(found))]
        data.dataset = {"images": images, "annotations": boxes, "categories": [{"id": c} for c in labels]}
        data.createIndex()
        run = evaluation.COCOeval(data, data.loadRes([d for d in detections if d["category_id"] in labels]), "bbox")
        run.params.iouThrs = np.array(thresholds)
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, -1]
    return {(t, c - 1): precision[i, :, k].mean() for i, t in enumerate(thresholds) for k, c in enumerate(labels)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", [False, True], ids=["continuous", "tied"])
def test_equal_to_pycocotools(seed, grid):
    found, truth = scenes(seed, grid=grid)
    expected = coco(found, truth, COCO_THRESHOLDS)
    result = mean_average_precision(found, truth, COCO_THRESHOLDS, "101-point", max_detections=100)
    assert result.table.keys() == expected.keys()
    for key, value in expected.items():
        assert result.table[key] == pytest.approx(value, abs=1e-9), key
    assert result.map == pytest.approx(np.mean(list(expected.values())), abs=1e-9)


def test_max_detections_keeps_the_best_of_each_image_and_class():
    truth = [entry([A, B], [0, 0])]
    found = [entry([FAR, A, B], [0, 0, 0], [0.9, 0.8, 0.7])]
    assert mean_average_precision(found, truth, max_detections=1).map == 0.0
    assert mean_average_precision(found, truth, max_detections=2).map == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(predictions=[]), "one entry for each image, got 0 and 1"),
        (dict(interpolation="area"), "'interpolation'"),
        (dict(match="="), "'match'"),
        (dict(iou_thresholds=(0.5, 1.5)), "'iou_thresholds'"),
        (dict(iou_thresholds=()), "'iou_thresholds'"),
        (dict(predictions=[entry([A], [0])]), "predictions[0] must hold the tensors"),
        (dict(predictions=[entry([A], [0], [0.5, 0.6])]), "predictions[0] must hold boxes"),
        (dict(predictions=[entry([A], [0], [float("nan")])]), "NaN"),
        (dict(targets=[entry([A], [0]) | {"labels": torch.zeros(1)}]), "must be integers"),
        (dict(targets=[entry([A], [0]) | {"iscrowd": torch.ones(1)}]), "crowd boxes"),
    ],
)
def test_errors(change, says):
    arguments = {"predictions": [entry([A], [0], [0.5])], "targets": [entry([A], [0])]} | change
    with pytest.raises(ValueError) as raised:
        mean_average_precision(**arguments)
    assert says in str(raised.value)
