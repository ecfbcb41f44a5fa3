"""Areas, forms, clipping and size of boxes on every backend: values, gradients, integers, torch's machinery."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _backends import available, backends_and_dtypes, backends_for
from _checks import (
    assert_same_bits,
    check_autocast,
    check_cases,
    check_compile,
    check_deterministic,
    check_gradcheck,
    check_layouts,
    check_opcheck,
)

import pydl
from bench.bench_box_utils import composition
from pydl import ops
from pydl.reference import specs

# arguments after the boxes
CALLS = {
    "box_area": (),
    "box_convert": ("xyxy", "cxcywh"),
    "clip_boxes_to_image": ((40, 50),),
    "remove_small_boxes": (8.0,),
}
SMOOTH = ("box_area", "box_convert", "clip_boxes_to_image")
FORMATS = ("xyxy", "xywh", "cxcywh")
NAMESPACES = {"cpu": torch.ops.pydl, "cuda": torch.ops.pydl, "simt": torch.ops.pydl_simt}


def every(*dtypes, names=tuple(CALLS), without=()):
    return [
        pytest.param(*p.values, id=f"{name}-{p.id}", marks=p.marks)
        for name in names
        for p in backends_for(name, *dtypes, without=without)
    ]


def every_dtype(names=tuple(CALLS), without=()):
    return [
        pytest.param(*p.values, id=f"{name}-{p.id}", marks=p.marks)
        for name in names
        for p in backends_and_dtypes(name, without)
    ]


def some_boxes(*shape, dtype=torch.float64, device="cpu"):
    """Boxes of 2 to 22 pixels, some of which leave an image of 40 x 50."""
    start = torch.rand(*shape, 2, dtype=torch.float64) * 50 - 5
    size = torch.rand(*shape, 2, dtype=torch.float64) * 20 + 2
    return torch.cat((start, start + size), -1).to(device, dtype)


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), every_dtype())
def test_values(backend, dtype):
    check_cases(backend, dtype, "values")


@pytest.mark.parametrize(("backend", "dtype"), every_dtype(SMOOTH))
def test_gradients(backend, dtype):
    check_cases(backend, dtype, "gradients")


@pytest.mark.parametrize(("backend", "dtype"), every_dtype(SMOOTH))
def test_second_gradients(backend, dtype):
    check_cases(backend, dtype, "second")


@pytest.mark.parametrize("name", CALLS)
def test_the_oracle_equals_a_composition_of_torch(name):
    boxes = some_boxes(50)
    got = specs(name)[name].forward(boxes.numpy(), *CALLS[name])
    torch.testing.assert_close(torch.from_numpy(got), composition(name)(boxes, *CALLS[name]))


def test_known_values():
    box = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    forms = {"xyxy": [1, 2, 4, 8], "xywh": [1, 2, 3, 6], "cxcywh": [2.5, 5, 3, 6]}
    for fmt, values in forms.items():
        for out, wanted in forms.items():
            assert ops.box_convert(torch.tensor([values], dtype=torch.float64), fmt, out).tolist() == [wanted]
        assert ops.box_area(torch.tensor([values], dtype=torch.float64), fmt).tolist() == [18.0]
    assert ops.clip_boxes_to_image(box - 2, (5, 1)).tolist() == [[0, 0, 1, 5]]
    assert ops.remove_small_boxes(torch.cat((box, box * 2, box / 2)), 3).tolist() == [0, 1]


@pytest.mark.parametrize("backend", every(torch.float16, names=("box_convert",)))
def test_half_precision_is_rounded_once(backend):
    # 65504 + 65504 overflows float16, their half does not
    boxes = torch.tensor([[65504.0, 1.0, 65504.0, 65504.0]], dtype=torch.float16, device=backend.device)
    assert backend(boxes, "xyxy", "cxcywh").tolist() == [[65504.0, 32752.0, 0.0, 65504.0]]
    area = available("box_area")
    for other in (b for b in area if b.name == backend.name and b.device == backend.device):
        assert other(boxes[:, [1, 1, 3, 3]]).item() == pytest.approx(65503.0**2)


# gradcheck


@pytest.mark.parametrize("backend", every(torch.float64, names=SMOOTH))
def test_gradcheck(backend):
    boxes = (some_boxes(5).round() + 0.25).to(backend.device).requires_grad_()  # no coordinate at a border
    forms = [(a, b) for a in FORMATS for b in FORMATS if a != b]
    calls = {"box_area": [(f,) for f in FORMATS], "box_convert": forms}.get(backend.op, [CALLS[backend.op]])
    for args in calls:
        check_gradcheck(lambda b: backend(b, *args), [boxes])  # noqa: B023


@pytest.mark.parametrize("backend", every(torch.float64, names=("clip_boxes_to_image",)))
def test_the_gradient_of_clipping_passes_at_the_borders(backend):
    boxes = torch.tensor([[0.0, -1.0, 50.0, 40.0], [-0.5, 0.0, 51.0, 41.0]], dtype=torch.float64, device=backend.device)
    (grad,) = torch.autograd.grad(backend(boxes.requires_grad_(), (40, 50)).sum(), boxes)
    assert grad.tolist() == [[1, 0, 1, 1], [0, 1, 0, 0]]


# layouts, sizes and dtypes


@pytest.mark.parametrize(("backend", "dtype"), every_dtype(without=("torch",)))
def test_layouts(backend, dtype):
    case = next(c for c in specs(backend.op)[backend.op].cases() if c.layouts)
    check_layouts(backend, dtype, case, ("values",) if backend.op == "remove_small_boxes" else ("values", "gradients"))


@pytest.mark.parametrize("backend", every(torch.float32))
def test_edge_sizes(backend):
    # around the lanes of each vector and the block of 256 threads
    for n in (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 33, 255, 257):
        boxes = some_boxes(n, dtype=torch.float32)
        y = backend(boxes.to(backend.device), *CALLS[backend.op])
        torch.testing.assert_close(y.cpu(), composition(backend.op)(boxes, *CALLS[backend.op]))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_integers_do_what_torch_does(name, dtype):
    boxes = (some_boxes(7).abs() * 2).to(dtype)
    y = getattr(ops, name)(boxes, *CALLS[name])
    expected = composition(name)(boxes.int() if name == "box_area" and dtype == torch.uint8 else boxes, *CALLS[name])
    if name == "box_area" and dtype != torch.int64:
        expected = expected.int()
    assert y.dtype == (boxes.dtype if name == "clip_boxes_to_image" else y.dtype)
    torch.testing.assert_close(y.double(), expected.double())


def test_dtypes_of_results():
    boxes = some_boxes(3)
    wanted = {
        torch.uint8: torch.int32,
        torch.int16: torch.int32,
        torch.int64: torch.int64,
        torch.float64: torch.float64,
    }
    for dtype, result in {**wanted, torch.float16: torch.float32, torch.bfloat16: torch.float32}.items():
        assert ops.box_area(boxes.abs().to(dtype)).dtype == result
        y = ops.box_convert(boxes.abs().to(dtype), "xyxy", "cxcywh")
        assert y.dtype == (dtype if dtype.is_floating_point else torch.float32)
        assert ops.box_convert(boxes.abs().to(dtype), "xyxy", "xywh").dtype == dtype


@pytest.mark.parametrize("name", SMOOTH)
def test_results_are_new_tensors(name):
    boxes = some_boxes(3)
    for args in (CALLS[name],) if name != "box_convert" else (("xyxy", "xyxy"), ("xyxy", "xywh")):
        y = getattr(ops, name)(boxes, *args)
        assert y.data_ptr() != boxes.data_ptr() and y.is_contiguous()


def test_more_dimensions_of_small_boxes_go_to_torch():
    boxes = some_boxes(2, 3)
    with pydl.trace() as seen:
        kept = ops.remove_small_boxes(boxes, 8.0)
    assert [r.backend for r in seen] == ["torch"]
    large = (boxes[..., 2:] - boxes[..., :2] >= 8.0).all(-1)
    assert torch.equal(kept, torch.where(large)[0])


# errors


@pytest.mark.parametrize("name", CALLS)
def test_errors(name):
    function = getattr(ops, name)
    for bad in (torch.rand(3, 5), torch.rand(()), torch.rand(3, 4, dtype=torch.complex64), torch.ones(3, 4).bool()):
        shown = str(list(bad.shape)) if bad.shape != (3, 4) else str(bad.dtype)
        with pytest.raises(RuntimeError, match=f"{name}.*boxes") as raised:
            function(bad, *CALLS[name])
        assert shown in str(raised.value)
    with pytest.raises(TypeError, match=f"{name}.*boxes.*list"):
        function([[0.0, 0.0, 1.0, 1.0]], *CALLS[name])


def test_errors_of_options():
    boxes = some_boxes(2)
    for call in (
        lambda: ops.box_area(boxes, "xywhr"),
        lambda: ops.box_convert(boxes, "xywhr", "xyxy"),
        lambda: ops.box_convert(boxes, "xyxy", "xywhr"),
    ):
        with pytest.raises(ValueError, match="fmt.*xyxy, xywh, cxcywh.*'xywhr'"):
            call()
    for size in ((4,), 4, (1, 2, 3)):
        with pytest.raises(ValueError, match="clip_boxes_to_image.*size"):
            ops.clip_boxes_to_image(boxes, size)
    for size in ((4, "5"), (True, 4), (4, None)):
        with pytest.raises(TypeError, match="clip_boxes_to_image.*size"):
            ops.clip_boxes_to_image(boxes, size)
    for least in ("8", None, True):
        with pytest.raises(TypeError, match="remove_small_boxes.*min_size"):
            ops.remove_small_boxes(boxes, least)


@pytest.mark.parametrize("backend", backends_for("box_area", torch.float32, without=("torch",)))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    namespace = NAMESPACES[backend.name]
    boxes, areas = torch.zeros(3, 4, device=backend.device), torch.zeros(3, device=backend.device)
    calls = [
        lambda: namespace.box_area_fwd(boxes[:, :3], True),
        lambda: namespace.box_area_fwd(boxes[0, 0], True),
        lambda: namespace.box_area_fwd(boxes.long(), True),
        lambda: namespace.box_area_bwd(areas[:2], boxes, True),
        lambda: namespace.box_area_bwd(areas.double(), boxes, True),
        lambda: namespace.box_form(boxes, 12),
        lambda: namespace.box_form(boxes, -1),
        lambda: namespace.box_form(boxes[:, :2], 0),
        lambda: namespace.box_clip(boxes[:, :2], 1.0, 1.0),
        lambda: namespace.box_clip_bwd(boxes[:2], boxes, 1.0, 1.0),
        lambda: namespace.box_clip_bwd(boxes.double(), boxes, 1.0, 1.0),
    ]
    if backend.name == "cpu":
        calls += [lambda: namespace.box_large(boxes[None], 1.0), lambda: namespace.box_large(boxes[:, :2], 1.0)]
    with backend.use():
        for call in calls:
            with pytest.raises(RuntimeError):
                call()


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available("box_area") if b.name in ("cpu", "simt")], ids=str)
def test_opcheck(backend):
    namespace = NAMESPACES[backend.name]
    boxes = some_boxes(5, dtype=torch.float32).requires_grad_()
    dy = torch.randn(5, 4, requires_grad=True)
    with backend.use():
        check_opcheck(namespace.box_area_fwd.default, boxes, True)
        check_opcheck(namespace.box_area_bwd.default, torch.randn(5, requires_grad=True), boxes, True)
        check_opcheck(namespace.box_form.default, boxes, 2)
        check_opcheck(namespace.box_clip.default, boxes, 40.0, 30.0)
        check_opcheck(namespace.box_clip_bwd.default, dy, boxes, 40.0, 30.0)
        if backend.name == "cpu":
            check_opcheck(namespace.box_large.default, boxes.detach(), 8.0)


@pytest.mark.compile
@pytest.mark.parametrize("name", SMOOTH)
def test_compile(name):
    function = getattr(ops, name)
    check_compile(lambda b: function(b, *CALLS[name]) * 2, [[some_boxes(n, dtype=torch.float32)] for n in (5, 9)])


@pytest.mark.compile
def test_compile_with_a_size_known_at_run_time():
    compiled = torch.compile(lambda b: ops.remove_small_boxes(b, 8.0) + 1, fullgraph=True, backend="aot_eager")
    for n in (40, 0):
        boxes = some_boxes(n, dtype=torch.float32)
        assert torch.equal(compiled(boxes), ops.remove_small_boxes(boxes, 8.0) + 1)


@pytest.mark.parametrize("backend", every(torch.float32))
def test_autocast(backend):
    boxes = some_boxes(4, dtype=torch.float32, device=backend.device)
    args = CALLS[backend.op]
    check_autocast(
        lambda b: backend(b, *args),
        lambda b: composition(backend.op)(b, *args),
        boxes,
        device=backend.device,
        low=torch.bfloat16,
    )


@pytest.mark.parametrize("backend", every(torch.float32, names=SMOOTH))
def test_deterministic(backend):
    boxes = some_boxes(300, dtype=torch.float32, device=backend.device)
    check_deterministic(lambda b: backend(b, *CALLS[backend.op]), boxes)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_count_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    boxes = some_boxes(20011, dtype=torch.float32)
    calls = [lambda name=name: getattr(ops, name)(boxes, *CALLS[name]) for name in CALLS]
    expected = [call() for call in calls]
    try:
        torch.set_num_threads(threads)
        for call, wanted in zip(calls, expected, strict=True):
            assert_same_bits(call(), wanted)
    finally:
        torch.set_num_threads(before)


def test_numbers_of_numpy_are_taken():
    boxes = some_boxes(9)
    assert torch.equal(ops.remove_small_boxes(boxes, np.float32(8.0)), ops.remove_small_boxes(boxes, 8.0))
