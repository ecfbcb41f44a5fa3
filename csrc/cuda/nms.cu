// Non-maximum suppression of axis-aligned boxes: torchvision's rule, exactly. A box goes when its IoU with a kept box
// of a higher score exceeds the threshold, IoU being inter / (area_a + area_b - inter) in the compute type.
#include "common/threshold.h"
#include "cuda/nms_boxes.h"
#include "cuda/nms_host.h"

namespace pydl {
namespace {

// f(geometry) with boxes of the compute type.
template <typename F>
auto with_geometry(const NmsCall& call, F&& f) {
  if (call.box_dtype == Dtype::kDouble) return f(AxisBoxes<double>{call.iou_threshold});
  return f(AxisBoxes<float>{float_below(call.iou_threshold)});
}

Tensor nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold) {
  const DeviceGuard guard(boxes);
  NmsInputs inputs("nms", guard, boxes, 4, scores, idxs);
  STD_TORCH_CHECK(inputs.dim == 2, "nms: boxes must have shape [N, 4]");
  inputs.call.iou_threshold = iou_threshold;
  return with_geometry(inputs.call, [&](const auto& geometry) { return suppress_all(guard, inputs.call, geometry); });
}

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                      double iou_threshold, int64_t max_output, std::optional<double> score_threshold) {
  const DeviceGuard guard(boxes);
  NmsInputs inputs("nms_padded", guard, boxes, 4, scores, idxs);
  STD_TORCH_CHECK(inputs.dim == 3, "nms_padded: boxes must have shape [B, N, 4]");
  STD_TORCH_CHECK(max_output >= 0, "nms_padded: max_output must not be negative, got ", max_output);
  NmsCall& call = inputs.call;
  call.iou_threshold = iou_threshold;
  call.most = max_output;
  call.limited = score_threshold.has_value();
  call.score_threshold = score_threshold.value_or(0);
  auto out = with_geometry(call, [&](const auto& geometry) { return suppress(guard, call, geometry); });
  return {std::move(out.first.tensor), std::move(out.second.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace pydl
