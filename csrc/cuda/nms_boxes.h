// Axis-aligned boxes on the device, and their IoU as the CPU kernels compute it, bit for bit.
#pragma once

#include "cuda/nms_numbers.h"

namespace pydl {
namespace {

// Products that are rounded by themselves: otherwise the compiler fuses them into the sum that follows.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

template <typename C>
struct alignas(16) Corners {
  C x1, y1, x2, y2;
};

template <typename C>
__device__ Corners<C> load_corners(const void* boxes, Dtype dtype, int64_t row) {
  C corner[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) corner[i] = C(load_number(boxes, dtype, 4 * row + i));
  return {corner[0], corner[1], corner[2], corner[3]};
}

// Whether the boxes have points in common; otherwise their IoU is 0 or NaN.
template <typename C>
__device__ bool meet(const Corners<C>& a, const Corners<C>& b) {
  return a.x1 < b.x2 && b.x1 < a.x2 && a.y1 < b.y2 && b.y1 < a.y2;
}

template <typename C>
__device__ C iou_of(const Corners<C>& a, const Corners<C>& b) {
  C width = max(min(a.x2, b.x2) - max(a.x1, b.x1), C(0));
  C height = max(min(a.y2, b.y2) - max(a.y1, b.y1), C(0));
  C inter = product(width, height);
  C area_a = product(a.x2 - a.x1, a.y2 - a.y1), area_b = product(b.x2 - b.x1, b.y2 - b.y1);
  return inter / (area_a + area_b - inter);
}

template <typename C>
struct AxisBoxes {
  static constexpr int kUnroll = 4;
  using Box = Corners<C>;

  C threshold;

  __device__ static Box load(const void* boxes, Dtype dtype, int64_t row) { return load_corners<C>(boxes, dtype, row); }

  __device__ bool suppresses(const Box& a, const Box& b) const {
    if (threshold >= 0 && !meet(a, b)) return false;  // most pairs end here
    return iou_of(a, b) > threshold;
  }
};

}  // namespace
}  // namespace pydl
