"""roi_align on every backend: values, gradients, conventions at the border, layouts, errors, compilation."""

from __future__ import annotations

import numpy as np
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
    INF,
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
from pydl.reference.roi_align import cases, roi_align, roi_align_grad

OP = "roi_align"
CASES = {case.name: case for case in cases()}


# values and gradients against the oracle


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP))
@pytest.mark.parametrize("level", ["values", "gradients", "second"])
def test_cases(backend, dtype, level):
    check_cases(backend, dtype, level)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_a_linear_map_is_sampled_exactly(backend):
    # bilinear samples of 2 y + 3 x are exact, and their mean is the value at the middle of the bin
    y, x = torch.arange(12.0, device=backend.device), torch.arange(10.0, device=backend.device)
    plane = (2 * y[:, None] + 3 * x).expand(1, 2, 12, 10)
    boxes = torch.tensor([[0, 1, 2, 5, 10], [0, 2.5, 3, 8.5, 4.5]], device=backend.device)
    for ratio in (1, 2, -1):
        out = backend(plane, boxes, (4, 2), 1.0, ratio)
        for k, (_, x1, y1, x2, y2) in enumerate(boxes.tolist()):
            rows = y1 + (torch.arange(4.0) + 0.5) * (y2 - y1) / 4
            cols = x1 + (torch.arange(2.0) + 0.5) * (x2 - x1) / 2
            expected = (2 * rows[:, None] + 3 * cols).expand(2, 4, 2)
            torch.testing.assert_close(out[k].cpu(), expected)
    shifted = backend(plane, boxes + torch.tensor([0, 0.5, 0.5, 0.5, 0.5], device=backend.device), 2, aligned=True)
    torch.testing.assert_close(shifted, backend(plane, boxes, 2))


# where samples fall: a map of 4 x 4 with the numbers 1 to 16, one bin, one sample in the middle of the box
@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-1.5, -1.5, -0.5, -0.5), 1.0),  # the sample is at -1: the last place that is clamped to pixel 0
        ((-1.6, -1.6, -0.6, -0.6), 0.0),  # and just beyond
        ((3.5, 3.5, 4.5, 4.5), 16.0),  # at 4, the size of the map
        ((3.6, 3.6, 4.6, 4.6), 0.0),
        ((2.9, 0.5, 3.9, 1.5), 8.0),  # between the last column and the border
        ((1.0, 1.0, 1.0, 1.0), (6 + 7 + 10 + 11) / 4),  # an empty box is one pixel wide
        ((3.0, 3.0, 1.0, 1.0), 16.0),  # an inverted one too: from 3 to 4
        ((-0.5, 1.0, 0.5, 2.0), 7.0),  # column 0, between rows 1 and 2
    ],
)
def test_conventions(backend, box, expected):
    plane = torch.arange(1.0, 17.0, device=backend.device).view(1, 1, 4, 4)
    y = backend(plane, torch.tensor([[0, *box]], device=backend.device), 1, 1.0, 1)
    assert y.item() == pytest.approx(expected)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_aligned_boxes_may_be_empty_or_inverted(backend):
    plane = torch.arange(1.0, 17.0, device=backend.device).view(1, 1, 4, 4)
    boxes = torch.tensor([[0.0, 1, 1, 1, 1], [0, 3, 3, 1, 1], [0, 3, 1, 1, 3]], device=backend.device)
    assert not backend(plane, boxes, 2, aligned=True).any()  # no samples
    inverted = backend(plane, boxes[1:2], 2, 1.0, 2, True)
    assert inverted.flatten().tolist() == [11.0, 10.0, 7.0, 6.0]  # bins from the right and from below


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_huge_boxes_end(backend, memory_format):
    # as many samples as the box has pixels: only those on the map may be looked at
    x = torch.ones(1, 17, 5, 6, device=backend.device).contiguous(memory_format=memory_format)
    boxes = torch.tensor([[0, -1e6, -1e6, 1e6, 1e6], [0, -1e30, -1e30, 1e30, 1e30]], device=backend.device)
    y = backend(x, boxes, 3)
    assert y.isfinite().all() and y[0, :, 1, 1].sum() > 0 and not y[0, :, 0].any()


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_infinities_stay_in_their_bins(backend, memory_format):
    x = torch.zeros(1, 17, 16, 16)
    x[:, ::2, 4, 4] = INF
    x = x.to(backend.device).contiguous(memory_format=memory_format).requires_grad_()
    boxes = torch.tensor([[0, 0.25, 0.25, 14.25, 14.25]], device=backend.device)
    y = backend(x, boxes, 7, 1.0, 2)
    assert y.isinf().sum() == 9 * 2 * 2 and not y.isnan().any()  # the last pixel of a bin, the first of the next
    dy = torch.zeros_like(y)
    dy[:, 1::2, 2, 2] = INF
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.isinf().sum() == 8 * 3 * 3 and not dx.isnan().any()


@pytest.mark.parametrize("backend", backends_for(OP, torch.float16, without=TORCH))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@LAYOUTS
def test_low_precision_is_summed_in_float32(backend, low, memory_format):
    # 256 boxes over one pixel: ones added to 256 one by one would stop there in bfloat16
    x = torch.ones(1, 9, 3, 3, device=backend.device, dtype=low).contiguous(memory_format=memory_format)
    x.requires_grad_()
    boxes = torch.tensor([[0, 0.5, 0.5, 1.5, 1.5]], device=backend.device, dtype=low).expand(512, 5)
    (dx,) = torch.autograd.grad(backend(x, boxes, 1, 1.0, 1).sum(), x)
    assert (dx[0, :, 1, 1] == 512).all()


# gradcheck


@pytest.mark.parametrize("backend", backends_for(OP, torch.float64))
@pytest.mark.parametrize("ratio", [-1, 2])
@LAYOUTS
def test_gradcheck(backend, ratio, memory_format):
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, device=backend.device).contiguous(memory_format=memory_format)
    boxes = some_boxes(3, 2, 4, 5, torch.float64, backend.device)
    check_gradcheck(lambda t: backend(t, boxes, (2, 3), 1.0, ratio), [x.requires_grad_()])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_boxes_have_no_gradient(backend):
    check_no_gradient_of_boxes(backend, 2)


# boxes, layouts and edge sizes


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_a_list_of_boxes_has_one_entry_for_each_image(backend):
    check_lists_of_boxes(backend, 4)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float16))
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_takes_boxes_in_float32(backend, low):
    # 300.25 is no bfloat16, and a coordinate of 2,049.5 no float16
    x = torch.arange(4096.0, device=backend.device).view(1, 1, 1, 4096).div(32).to(low)
    boxes = torch.tensor([[0, 2049.5, 0, 2050.5, 1], [0, 300.25, 0, 302.25, 1]], device=backend.device)
    wide = backend(x.float(), boxes, 1, 1.0, 2)
    assert_same_bits(backend(x, boxes, 1, 1.0, 2), wide.to(low))
    exact = boxes.to(low).float()
    assert_same_bits(backend(x, boxes.to(low), 1, 1.0, 2), backend(x, exact, 1, 1.0, 2))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(OP, without=TORCH))
def test_layouts(backend, dtype):
    check_layouts(backend, dtype, CASES["k7 s2"])


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
# 1 has both layouts at once; vector widths +- 1; 130: blocks of 64 channels and a rest
@pytest.mark.parametrize("channels", [1, 2, 3, 16, 31, 32, 33, 65, 130])
def test_layout_is_kept(backend, channels):
    check_layout_is_kept(backend, channels, (2, 3), 1.0, 2)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_edge_sizes(backend, memory_format):
    # widths and bins around the vectors of 4, 8 and 16: whole, partial, shifted to the left, and larger than the map
    rng = np.random.default_rng(5)
    for width, bins in ((1, 1), (3, 17), (7, 8), (8, 7), (15, 16), (16, 5), (17, 33), (33, 15), (40, 4)):
        x = torch.from_numpy(rng.standard_normal((1, 2, 4, width))).float().contiguous(memory_format=memory_format)
        boxes = torch.tensor([[0, 0, 0, width, 4], [0, width - 2.5, 1, width, 3], [0, 0.3, 0.2, 1.9, 3.1]])
        leaf = x.clone().to(backend.device).requires_grad_()
        y = backend(leaf, boxes.to(backend.device), (9, bins), 1.0, 1)
        array = x.double().numpy()
        np.testing.assert_allclose(
            y.detach().cpu().numpy(), roi_align(array, boxes.double().numpy(), (9, bins), 1.0, 1), atol=2e-6
        )
        dy = torch.from_numpy(rng.standard_normal(y.shape)).float()
        (dx,) = torch.autograd.grad(y, leaf, dy.to(backend.device))
        (oracle,) = roi_align_grad(dy.double().numpy(), array, boxes.double().numpy(), (9, bins), 1.0, 1)
        np.testing.assert_allclose(dx.cpu().numpy(), oracle, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
@LAYOUTS
def test_every_thread_count_gives_the_same_bits(threads, memory_format):
    x = torch.randn(2, 70, 40, 41).contiguous(memory_format=memory_format)
    boxes = some_boxes(60, 2, 40, 41)
    check_thread_counts(threads, x, lambda t: ops.roi_align(t, boxes, 7, 1.0, 2))


# errors


@refused(*REFUSED_SAMPLINGS, (dict(aligned=1), TypeError, ["aligned", "1"]))
def test_errors(arguments, error, says):
    check_refused(OP, arguments, error, says)


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@NO_IMAGES
def test_images_that_do_not_exist(backend, image):
    check_images_that_do_not_exist(backend, image, 3)


def test_fractions_of_an_image_number_are_cut_off():
    x = torch.randn(2, 3, 5, 5)
    boxes = torch.tensor([[-0.5, 0, 0, 4, 4], [1.9, 0, 0, 4, 4]])
    assert_same_bits(ops.roi_align(x, boxes, 2), ops.roi_align(x, boxes.trunc(), 2))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
def test_raw_operators_refuse_what_they_cannot_read(backend):
    x, boxes = torch.zeros(1, 2, 4, 4, device=backend.device), torch.zeros(1, 5, device=backend.device)
    dy = torch.zeros(1, 2, 2, 2, device=backend.device)
    calls = [
        ("roi_align_fwd", x[0], boxes, 2, 2, 1.0, 2, False),
        ("roi_align_fwd", x.long(), boxes, 2, 2, 1.0, 2, False),
        ("roi_align_fwd", x[..., :0], boxes, 2, 2, 1.0, 2, False),
        ("roi_align_fwd", x, boxes[:, :4], 2, 2, 1.0, 2, False),
        ("roi_align_fwd", x, boxes.half(), 2, 2, 1.0, 2, False),
        ("roi_align_fwd", x, boxes, 0, 2, 1.0, 2, False),
        ("roi_align_fwd", x, boxes, 2, 2**31, 1.0, 2, False),
        ("roi_align_fwd", x, boxes, 2, 2, 1.0, 2**40, False),
        ("roi_align_bwd", dy[0], boxes, 1, 4, 4, 1.0, 2, False, False),
        ("roi_align_bwd", dy, boxes.expand(2, 5), 1, 4, 4, 1.0, 2, False, False),
        ("roi_align_bwd", dy, boxes, -1, 4, 4, 1.0, 2, False, False),
        ("roi_align_bwd", dy, boxes, 1, 0, 4, 1.0, 2, False, False),
        ("roi_align_bwd", dy, boxes, 2**30, 2**30, 2**30, 1.0, 2, False, False),
    ]
    check_raw_calls(backend, calls)


def test_a_forced_backend_that_cannot_run_says_why():
    with pydl.backend("triton"), pytest.raises(RuntimeError, match=r"roi_align.*triton"):
        ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)


# torch's machinery


@pytest.mark.parametrize("backend", [b for b in available(OP) if b.name in ("cpu", "simt")], ids=str)
@LAYOUTS
def test_opcheck(backend: Backend, memory_format):
    namespace = NAMESPACES[backend.name]
    with backend.use():
        x = torch.randn(2, 3, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
        boxes = some_boxes(3, 2, 6, 5)
        check_opcheck(namespace.roi_align_fwd.default, x, boxes, 2, 3, 0.5, 2, True)
        dy = torch.randn(3, 3, 2, 3).contiguous(memory_format=memory_format).requires_grad_()
        last = memory_format is CHANNELS_LAST
        check_opcheck(namespace.roi_align_bwd.default, dy, boxes, 2, 6, 5, 0.5, -1, False, last)


@pytest.mark.compile
@LAYOUTS
def test_compile(memory_format):
    boxes = some_boxes(4, 1, 8, 6)

    def fn(x):
        return ops.roi_align(x, boxes, (2, 3), 1.0, 2) * 2

    check_compile(
        fn, [[torch.randn(*s).contiguous(memory_format=memory_format)] for s in ((2, 3, 8, 8), (1, 3, 11, 6))]
    )


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32))
def test_autocast(backend):
    x, boxes = torch.randn(1, 2, 6, 6, device=backend.device), torch.tensor([[0, 1.0, 1, 4, 5]], device=backend.device)
    for given in (x, x.bfloat16()):
        check_autocast(
            backend, _roi_torch.roi_align, given, boxes, 2, 1.0, 2, device=backend.device, low=torch.bfloat16
        )
    with torch.autocast(backend.device, dtype=torch.bfloat16):  # boxes from a head in half precision
        assert_same_bits(backend(x, boxes.bfloat16(), 2), backend(x, boxes, 2))


@pytest.mark.parametrize("backend", backends_for(OP, torch.float32, without=TORCH))
@LAYOUTS
def test_deterministic(backend, memory_format):
    x = torch.randn(1, 5, 12, 13, device=backend.device).contiguous(memory_format=memory_format)
    boxes = some_boxes(30, 1, 12, 13, device=backend.device)  # dozens overlap at each pixel
    check_deterministic(lambda t: backend(t, boxes, 3, 1.0, 2), x)


def test_module():
    x, boxes = torch.randn(1, 2, 6, 6), torch.tensor([[0, 1.0, 1, 4, 5]])
    module = pydl.nn.RoIAlign((3, 2), 0.5, sampling_ratio=2, aligned=True)
    assert_same_bits(module(x, boxes), ops.roi_align(x, boxes, (3, 2), 0.5, 2, True))
    assert_same_bits(module(x, [boxes[:, 1:]]), module(x, boxes))
    assert repr(module) == "RoIAlign(output_size=(3, 2), spatial_scale=0.5, sampling_ratio=2, aligned=True)"
    assert not module.state_dict()
    assert [node.op for node in torch.fx.symbolic_trace(module).graph.nodes].count("call_function") == 1
