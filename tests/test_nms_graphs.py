"""nms and its variants as torch meets them: errors, raw operators, opcheck, compiled and exported graphs."""

from __future__ import annotations

import pytest
import torch
from _backends import backends_for
from _checks import assert_same_bits, check_opcheck
from _nms import boxes_of

from pydl import ops

TORCH = ("torch",)
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}

# errors


BOXES, SCORES, IDXS = torch.ones(5, 4), torch.ones(5), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((BOXES[0], SCORES, 0.5), ["'boxes'", "[N, 4]", "[4]"]),
        ((BOXES[:, :3], SCORES, 0.5), ["'boxes'", "[5, 3]"]),
        ((BOXES, BOXES, 0.5), ["'scores'", "[5]", "[5, 4]"]),
        ((BOXES, SCORES[:4], 0.5), ["'scores'", "[4]"]),
        ((BOXES.long(), SCORES, 0.5), ["'boxes'", "floating", "torch.int64"]),
        ((BOXES, SCORES.int(), 0.5), ["'scores'", "torch.int32"]),
    ],
)
def test_errors_of_torchvisions_class(args, says):
    # torchvision's own checks are TORCH_CHECK: RuntimeError for ranks, sizes and dtypes
    with pytest.raises(RuntimeError, match="^nms: argument") as raised:
        ops.nms(*args)
    for part in says:
        assert part in str(raised.value)


def test_errors_of_other_arguments():
    with pytest.raises(TypeError, match=r"nms: argument 'boxes' must be a Tensor, got list"):
        ops.nms([[0, 0, 1, 1]], SCORES, 0.5)
    with pytest.raises(TypeError, match=r"nms: argument 'iou_threshold' must be a number, got 'half'"):
        ops.nms(BOXES, SCORES, "half")
    with pytest.raises(RuntimeError, match=r"batched_nms: argument 'idxs' must be integers, got torch.float32"):
        ops.batched_nms(BOXES, SCORES, SCORES, 0.5)
    with pytest.raises(RuntimeError, match=r"batched_nms: argument 'idxs' must have shape \[N\] = \[5\], got \[4\]"):
        ops.batched_nms(BOXES, SCORES, IDXS[:4], 0.5)
    with pytest.raises(RuntimeError, match=r"batched_nms: argument 'idxs' must be on cpu as boxes, got meta"):
        ops.batched_nms(BOXES, SCORES, IDXS.to("meta"), 0.5)
    with pytest.raises(RuntimeError, match=r"nms_padded: argument 'boxes' must have shape \[B, N, 4\], got \[5, 4\]"):
        ops.nms_padded(BOXES, SCORES, 0.5, 3)
    with pytest.raises(RuntimeError, match=r"nms_padded: argument 'max_output' must not be negative, got -1"):
        ops.nms_padded(BOXES[None], SCORES[None], 0.5, -1)
    with pytest.raises(TypeError, match=r"nms_padded: argument 'max_output' must be an int, got 2.5"):
        ops.nms_padded(BOXES[None], SCORES[None], 0.5, 2.5)
    with pytest.raises(TypeError, match=r"nms_padded: argument 'score_threshold' must be a number, got 'low'"):
        ops.nms_padded(BOXES[None], SCORES[None], 0.5, 2, "low")


@pytest.mark.parametrize("backend", backends_for("nms", without=TORCH))
def test_raw_operators_check_what_they_read(backend):
    namespace = NAMESPACES[backend.name]
    boxes, scores, idxs = (t.to(backend.device) for t in (BOXES, SCORES, IDXS))
    with backend.use():
        for bad in (
            (boxes[:, :3], scores, None, 0.5),
            (boxes[0], scores, None, 0.5),
            (boxes.long(), scores, None, 0.5),
            (boxes, scores[:3], None, 0.5),
            (boxes, scores.long(), None, 0.5),
            (boxes, scores, idxs[:2], 0.5),
            (boxes, scores, idxs.int(), 0.5),
        ):
            with pytest.raises(RuntimeError, match="nms: "):
                namespace.nms(*bad)
        with pytest.raises(RuntimeError, match="max_output"):
            namespace.nms_padded(boxes[None], scores[None], None, 0.5, -3, None)
        with pytest.raises(RuntimeError, match="boxes"):
            namespace.nms_padded(boxes, scores, None, 0.5, 3, None)


# torch's machinery


@pytest.mark.parametrize("backend", backends_for("nms", without=TORCH))
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    boxes, scores = (t.to(backend.device) for t in boxes_of(20))
    idxs = torch.arange(20, device=boxes.device) % 2
    with backend.use():
        check_opcheck(namespace.nms, boxes, scores, None, 0.5)
        check_opcheck(namespace.nms, boxes, scores, idxs, 0.5)
        check_opcheck(namespace.nms_padded, boxes[None], scores[None], None, 0.5, 30, None)
        check_opcheck(namespace.nms_padded, boxes[None], scores[None], idxs[None], 0.5, 7, 0.25)


@pytest.mark.compile
@pytest.mark.parametrize("backend", backends_for("nms_padded", without=TORCH))
def test_padded_compiles_and_exports(backend):
    def detect(boxes, scores):
        indices, counts = ops.nms_padded(boxes * 2, scores, 0.5, 16, 0.1)
        return boxes.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, 4)), counts

    inputs = [tuple(t[None].to(backend.device) for t in boxes_of(n)) for n in (40, 50, 61)]
    with backend.use():
        torch._dynamo.reset()
        compiled = torch.compile(detect, fullgraph=True, backend="aot_eager")
        for args in inputs:
            for a, b in zip(compiled(*args), detect(*args), strict=True):
                assert_same_bits(a, b)

        class Detect(torch.nn.Module):
            def forward(self, boxes, scores):
                return detect(boxes, scores)

        n = torch.export.Dim("n", min=2)
        program = torch.export.export(Detect(), inputs[0], dynamic_shapes=({1: n}, {1: n}))
        for args in inputs:
            for a, b in zip(program.module()(*args), detect(*args), strict=True):
                assert_same_bits(a, b)


@pytest.mark.compile
@pytest.mark.parametrize("backend", backends_for("nms", without=TORCH))
def test_unpadded_compiles_with_an_unbacked_size(backend):
    def best(boxes, scores):
        return scores[ops.nms(boxes, scores, 0.5)] * 2

    with backend.use():
        torch._dynamo.reset()
        compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
        for n in (30, 41):
            args = [t.to(backend.device) for t in boxes_of(n)]
            assert_same_bits(compiled(*args), best(*args))
