// Non-maximum suppression of axis-aligned boxes: torchvision's rule, exactly. A box goes when its IoU with a kept box
// of a higher score exceeds the threshold, IoU being inter / (area_a + area_b - inter) in the compute type.
#include "cuda/nms_host.h"

namespace pydl {
namespace {

// Products that are rounded by themselves: otherwise the compiler fuses them into the sum that follows.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

template <typename C>
struct AxisBoxes {
  static constexpr bool kClasses = true;
  struct alignas(16) Box {
    C x1, y1, x2, y2;
  };

  C threshold;

  __device__ static Box load(const void* boxes, Dtype dtype, int64_t row) {
    C corner[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) corner[i] = C(load_number(boxes, dtype, 4 * row + i));
    return {corner[0], corner[1], corner[2], corner[3]};
  }

  __device__ bool suppresses(const Box& a, const Box& b) const {
    // boxes that do not meet have an IoU of 0 or NaN: most pairs end here
    if (threshold >= 0 && !(a.x1 < b.x2 && b.x1 < a.x2 && a.y1 < b.y2 && b.y1 < a.y2)) return false;
    C width = max(min(a.x2, b.x2) - max(a.x1, b.x1), C(0));
    C height = max(min(a.y2, b.y2) - max(a.y1, b.y1), C(0));
    C inter = product(width, height);
    C area_a = product(a.x2 - a.x1, a.y2 - a.y1), area_b = product(b.x2 - b.x1, b.y2 - b.y1);
    return inter / (area_a + area_b - inter) > threshold;
  }
};

// f(geometry) with boxes of the compute type. The threshold becomes the largest value of it that is not above t: x > t
// and x > this are the same for every x of that type.
template <typename F>
auto with_geometry(const NmsCall& call, F&& f) {
  if (call.box_dtype == Dtype::kDouble) return f(AxisBoxes<double>{call.iou_threshold});
  const float near = float(call.iou_threshold);
  const bool above = double(near) > call.iou_threshold;
  return f(AxisBoxes<float>{above ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near});
}

Tensor nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold) {
  STD_TORCH_CHECK(Array(boxes).dim == 2, "nms: boxes must have shape [N, 4]");
  const DeviceGuard guard(boxes);
  NmsInputs inputs("nms", boxes, 4, scores, idxs);
  guard.check_same("nms", "scores", scores);
  if (idxs) guard.check_same("nms", "idxs", *idxs);
  inputs.call.iou_threshold = iou_threshold;
  return with_geometry(inputs.call, [&](const auto& geometry) { return suppress_all(guard, inputs.call, geometry); });
}

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                      double iou_threshold, int64_t max_output, std::optional<double> score_threshold) {
  STD_TORCH_CHECK(Array(boxes).dim == 3, "nms_padded: boxes must have shape [B, N, 4]");
  STD_TORCH_CHECK(max_output >= 0, "nms_padded: max_output must not be negative, got ", max_output);
  const DeviceGuard guard(boxes);
  NmsInputs inputs("nms_padded", boxes, 4, scores, idxs);
  guard.check_same("nms_padded", "scores", scores);
  if (idxs) guard.check_same("nms_padded", "idxs", *idxs);
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
