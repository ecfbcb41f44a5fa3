// Non-maximum suppression of rotated boxes: the kernels of nms.h with another rule.
#include "common/rotated_box.h"
#include "cuda/nms_host.h"

namespace pydl {
namespace {

struct RotatedBoxes {
  static constexpr int kUnroll = 1;
  using Box = RotatedBox;

  double threshold;

  __device__ static Box load(const void* boxes, Dtype dtype, int64_t row) {
    double number[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) number[i] = load_number(boxes, dtype, 5 * row + i);
    return rotated_box(number[0], number[1], number[2], number[3], number[4]);
  }

  __device__ bool suppresses(const Box& kept, const Box& later) const {
    if (threshold >= 0 && !bounds_meet(kept, later)) return false;  // most pairs end here
    return rotated_iou(kept, later) > threshold;
  }
};

Tensor nms_rotated(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold) {
  const DeviceGuard guard(boxes);
  const NmsInputs inputs("nms_rotated", guard, boxes, 5, scores, idxs);
  STD_TORCH_CHECK(inputs.dim == 2, "nms_rotated: boxes must have shape [N, 5]");
  return suppress_all(guard, inputs.call, RotatedBoxes{iou_threshold});
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("nms_rotated", TORCH_BOX(&nms_rotated)); }

}  // namespace pydl
