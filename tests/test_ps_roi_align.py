"""ps_roi_align on every backend: values, gradients, which channel a bin reads, layouts, errors, compilation."""

from __future__ import annotations

import pytest
import torch
from _backends import Backend, available, backends_and_dtypes, backends_for
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
from _roi import (
    CHANNELS_LAST,
    LAYOUTS,
    NAMESPACES,
    NO_IMAGES,
    REFUSED_SAMPLINGS,
    TORCH,
    check_images_that_do_not_exist,
    check_layout_is_kept,
    check_lists_of_boxes,
    check_no_gradient_of_boxes,
    check_raw_calls,
    check_refused,
    check_thread_counts,
    refused,
    some_boxes,
)

import pydl
from pydl import ops
from pydl.ops import _roi_torch
from pydl.reference.ps_roi_align import cases

OP = "ps_roi_align"
CASES = {case.name: case for case in cases()}


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
@pytest.mark.parametrize("level", ["values", "gradients", "second"])
def test_cases(backend, dtype, level):
    check_cases(backend, dtype, level)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@LAYOUTS
def test_each_bin_reads_its_own_channel(backend, memory_format):
    # channel n holds n everywhere, so that bin (i, j) of channel c shows which one it read
    x = torch.arange(12.0, device=backend.device)[:, None, None].expand(1, 12, 6, 7)
    x = x.contiguous(memory_format=memory_format)
    y = backend(x, torch.tensor([[0, 1.0, 1, 6, 5]], device=backend.device), (3, 2), 1.0, 2)
    assert y.shape == (1, 2, 3, 2)
    torch.testing.assert_close(y.flatten().cpu(), torch.arange(12.0))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("ratio", [-1, 2])
def test_every_bin_is_that_of_roi_align(backend, ratio):
    x, boxes = torch.randn(2, 18, 9, 8, device=backend.device), some_boxes(4, 2, 9, 8, device=backend.device)
    pooled = ops.roi_align(x, boxes, 3, 0.5, ratio, aligned=True)
    own = torch.stack([pooled[:, n::9, n // 3, n % 3] for n in range(9)], 2)
    torch.testing.assert_close(backend(x, boxes, 3, 0.5, ratio), own.unflatten(2, (3, 3)))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_a_bin_without_samples_is_nan(backend):
    plane = torch.arange(1.0, 17.0, device=backend.device).view(1, 1, 4, 4).expand(1, 4, 4, 4)
    leaf = plane.clone().requires_grad_()
    boxes = torch.tensor([[0.0, 1, 1, 1, 1], [0, 3, 3, 1, 1], [0, 1, 1, 3, 1], [0, 1, 1, 3, 3]], device=backend.device)
    y = backend(leaf, boxes, 2)
    assert y[0].isnan().all() and y[2].isnan().all()  # 0 / 0
    assert not y[1].any()  # inverted: the sum of nothing, over a count that is not 0
    (dx,) = torch.autograd.grad(y[3].sum() + y[0].sum(), leaf)
    assert dx.isfinite().all() and dx.sum().item() == pytest.approx(4)
    inverted = backend(plane, boxes[1:2], 2, 1.0, 2)
    assert inverted.flatten().tolist() == [11.0, 10.0, 7.0, 6.0]  # bins from the right and from below
    assert backend(plane, boxes[:1], 2, 1.0, 2).flatten().tolist() == [3.5] * 4  # all samples at (0.5, 0.5)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@LAYOUTS
def test_low_precision_is_summed_in_float32(backend, low, memory_format):
    # 512 boxes over one pixel: ones added to 256 one by one would stop there in bfloat16
    x = torch.ones(1, 8, 3, 3, device=backend.device, dtype=low).contiguous(memory_format=memory_format)
    x.requires_grad_()
    boxes = torch.tensor([[0, 1.0, 1.0, 2.0, 2.0]], device=backend.device, dtype=low).expand(512, 5)
    (dx,) = torch.autograd.grad(backend(x, boxes, 1, 1.0, 1).sum(), x)
    assert (dx[0, :, 1, 1] == 512).all()


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize("ratio", [-1, 2])
@LAYOUTS
def test_gradcheck(backend, ratio, memory_format):
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, device=backend.device).contiguous(memory_format=memory_format)
    boxes = some_boxes(3, 2, 4, 5, torch.float64, backend.device)
    check_gradcheck(lambda t: backend(t, boxes, (2, 1), 1.0, ratio), [x.requires_grad_()])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_boxes_have_no_gradient(backend):
    check_no_gradient_of_boxes(backend, 8)


# boxes, layouts and edge sizes


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_a_list_of_boxes_has_one_entry_for_each_image(backend):
    check_lists_of_boxes(backend, 18)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["k3 s2"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize("channels", [1, 2, 7, 33])  # of the output; 7 and 33 leave threads without a whole group
def test_layout_is_kept(backend, channels):
    check_layout_is_kept(backend, 6 * channels, (2, 3), 1.0, 2)


@pytest.mark.parametrize("threads", [1, 2, 5])
@LAYOUTS
def test_every_thread_count_gives_the_same_bits(threads, memory_format):
    x = torch.randn(2, 72, 40, 41).contiguous(memory_format=memory_format)
    boxes = some_boxes(60, 2, 40, 41)
    check_thread_counts(threads, x, lambda t: ops.ps_roi_align(t, boxes, 3, 1.0, 2))


# errors


@refused(
    *REFUSED_SAMPLINGS,
    (dict(output_size=2), RuntimeError, ["input", "multiple of 2 * 2 channels", "1"]),
    (dict(input=torch.zeros(1, 7, 4, 4), output_size=(2, 3)), RuntimeError, ["multiple of 2 * 3", "7"]),
)
def test_errors(arguments, error, says):
    check_refused(OP, arguments, error, says)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@NO_IMAGES
def test_images_that_do_not_exist(backend, image):
    check_images_that_do_not_exist(backend, image, 8)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    x, boxes = torch.zeros(1, 4, 4, 4, device=backend.device), torch.zeros(1, 5, device=backend.device)
    dy = torch.zeros(1, 1, 2, 2, device=backend.device)
    calls = [
        ("ps_roi_align_fwd", x[0], boxes, 2, 2, 1.0, 2),
        ("ps_roi_align_fwd", x.long(), boxes, 2, 2, 1.0, 2),
        ("ps_roi_align_fwd", x[:, :3], boxes, 2, 2, 1.0, 2),
        ("ps_roi_align_fwd", x, boxes[:, :4], 2, 2, 1.0, 2),
        ("ps_roi_align_fwd", x, boxes.half(), 2, 2, 1.0, 2),
        ("ps_roi_align_fwd", x, boxes, 0, 2, 1.0, 2),
        ("ps_roi_align_fwd", x, boxes, 2**30, 2**30, 1.0, 2),
        ("ps_roi_align_fwd", x, boxes, 2, 2, 1.0, 2**40),
        ("ps_roi_align_bwd", dy[0], boxes, 1, 4, 4, 1.0, 2, False),
        ("ps_roi_align_bwd", dy, boxes.expand(2, 5), 1, 4, 4, 1.0, 2, False),
        ("ps_roi_align_bwd", dy, boxes, -1, 4, 4, 1.0, 2, False),
        ("ps_roi_align_bwd", dy, boxes, 1, 0, 4, 1.0, 2, False),
        ("ps_roi_align_bwd", dy, boxes, 2**30, 2**30, 2**30, 1.0, 2, False),
        ("ps_roi_align_bwd", dy[..., :1, :1].expand(1, 2**20, 2**15, 2**15), boxes, 1, 4, 4, 1.0, 2, False),
    ]
    check_raw_calls(backend, calls)


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(OP) if b.name in ("cpu", "simt")], ids=str)
@LAYOUTS
def test_opcheck(backend: Backend, memory_format):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        x = torch.randn(2, 12, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
        boxes = some_boxes(3, 2, 6, 5)
        check_opcheck(namespace.ps_roi_align_fwd.default, x, boxes, 2, 3, 0.5, 2)
        dy = torch.randn(3, 2, 2, 3).contiguous(memory_format=memory_format).requires_grad_()
        last = memory_format is CHANNELS_LAST
        check_opcheck(namespace.ps_roi_align_bwd.default, dy, boxes, 2, 6, 5, 0.5, 2, last)


@pytest.mark.compile
@LAYOUTS
def test_compile(memory_format):
    boxes = some_boxes(4, 1, 8, 6)

    def fn(x):
        return ops.ps_roi_align(x, boxes, (2, 3), 1.0, 2) * 2

    check_compile(
        fn, [[torch.randn(*s).contiguous(memory_format=memory_format)] for s in ((2, 12, 8, 8), (1, 12, 11, 6))]
    )


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    x, boxes = torch.randn(1, 8, 6, 6, device=backend.device), torch.tensor([[0, 1.0, 1, 4, 5]], device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(
            backend, _roi_torch.ps_roi_align, given, boxes, 2, 1.0, 2, device=backend.device, low=torch.bfloat16
        )


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_deterministic(backend, memory_format):
    x = torch.randn(1, 18, 12, 13, device=backend.device).contiguous(memory_format=memory_format)
    boxes = some_boxes(30, 1, 12, 13, device=backend.device)  # dozens overlap at each pixel
    check_deterministic(lambda t: backend(t, boxes, 3, 1.0, 2), x)


def test_module():
    x, boxes = torch.randn(1, 12, 6, 6), torch.tensor([[0, 1.0, 1, 4, 5]])
    module = pydl.nn.PSRoIAlign((3, 2), 0.5, 2)
    assert_same_bits(module(x, boxes), ops.ps_roi_align(x, boxes, (3, 2), 0.5, 2))
    assert_same_bits(module(x, [boxes[:, 1:]]), module(x, boxes))
    assert repr(module) == "PSRoIAlign(output_size=(3, 2), spatial_scale=0.5, sampling_ratio=2)"
    assert not module.state_dict()
    assert [node.op for node in torch.fx.symbolic_trace(module).graph.nodes].count("call_function") == 1
