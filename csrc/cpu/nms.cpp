// Non-maximum suppression of axis-aligned boxes: torchvision's rule, exactly. A box goes when its IoU with a kept box
// of a higher score exceeds the threshold, IoU being inter / (area_a + area_b - inter) in the compute type.
#include "cpu/nms_iou.h"
#include "cpu/nms_segment.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

// EVERY: the threshold is negative, so that boxes which do not meet count too.
template <class C, bool EVERY>
struct AxisBoxes {
  using Compute = C;
  static constexpr bool kEveryPair = EVERY;

  Rectangles<C> boxes;
  const C* area;
  C threshold;
  C factor;  // a little less than t / (1 + t): overlap per area
  C inset;   // a little less than t

  explicit AxisBoxes(const NmsJob& job)
      : boxes{static_cast<C*>(job.x1), static_cast<C*>(job.y1), static_cast<C*>(job.x2), static_cast<C*>(job.y2)},
        area(static_cast<const C*>(job.area)),
        threshold(C(job.threshold)) {
    factor = threshold / (1 + threshold) * (1 - 16 * kEpsilon<C>);
    inset = (threshold < 1 ? threshold : C(1)) * (1 - 1024 * kEpsilon<C>);
  }

  // Without an area that is positive and finite the IoU of a pair is 0, NaN or an infinity's quotient, which is 0.
  bool live(int64_t i) const {
    if constexpr (EVERY) return true;
    return boxes.x2[i] > boxes.x1[i] && boxes.y2[i] > boxes.y1[i] && area[i] > 0 && area[i] < kInfinity<C>;
  }

  C share(int64_t i) const { return factor * area[i] - kTiny<C>; }

  // The IoU of two boxes exceeds t only if in each direction that of their sides does, so that the partner covers more
  // than t of the probe's side: it reaches past what t of the side leaves over.
  Probe<C> probe(int64_t i) const {
    const C x1 = boxes.x1[i], y1 = boxes.y1[i], x2 = boxes.x2[i], y2 = boxes.y2[i];
    // products among subnormal numbers are too coarse for that
    const C part = area[i] * threshold < kTiny<C> * 4096 ? 0 : inset;
    const C across = part * (x2 - x1), down = part * (y2 - y1);
    return {i,
            splat(x1),
            splat(y1),
            splat(x2),
            splat(y2),
            splat(area[i]),
            splat(share(i)),
            splat(x1 + across),
            splat(y1 + down),
            splat(x2 - across),
            splat(y2 - down)};
  }

  bool decide(const KeptGrid<C>& grid, const Probe<C>& p, int64_t slot, Vec<C> width, Vec<C> height,
              uint32_t lanes) const {
    const Vec<C> x1 = load(grid.kept.x1 + slot), y1 = load(grid.kept.y1 + slot);
    const Vec<C> x2 = load(grid.kept.x2 + slot), y2 = load(grid.kept.y2 + slot);
    const Vec<C> inter = overlap_of(width, height);
    const Vec<C> iou = inter / (p.area + area_of(x1, y1, x2, y2) - inter);
    return (lanes & lane_bits<C>(greater(iou, splat(threshold)))) != 0;
  }
};

template <class F>
void with_shape(const NmsJob& job, F&& f) {
  const bool wide = job.dtype == Dtype::kDouble, every = job.threshold < 0;
  if (wide) {
    every ? f(AxisBoxes<double, true>(job)) : f(AxisBoxes<double, false>(job));
  } else {
    every ? f(AxisBoxes<float, true>(job)) : f(AxisBoxes<float, false>(job));
  }
}

}  // namespace

// Fills the coordinates and areas of positions [begin, end).
void nms_gather(const NmsJob& job, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(job.dtype, {
    using C = compute_t<T>;
    for (int64_t i = begin; i < end; ++i) {
      const T* box = static_cast<const T*>(job.boxes) + 4 * job.source[i];
      const C x1 = to_compute(box[0]), y1 = to_compute(box[1]), x2 = to_compute(box[2]), y2 = to_compute(box[3]);
      static_cast<C*>(job.x1)[i] = x1;
      static_cast<C*>(job.y1)[i] = y1;
      static_cast<C*>(job.x2)[i] = x2;
      static_cast<C*>(job.y2)[i] = y2;
      static_cast<C*>(job.area)[i] = area_of(x1, y1, x2, y2);
    }
  });
}

void nms_segment(const NmsJob& job, const NmsSegment& segment, char* scratch) {
  with_shape(job, [&](const auto& shape) { settle_segment(shape, segment, job.keep, scratch); });
}
void nms_begin(const NmsJob& job, const NmsSegment& segment, char* scratch) {
  with_shape(job, [&](const auto& shape) { begin_shared(shape, segment, scratch); });
}
void nms_probe(const NmsJob& job, int64_t begin, int64_t end, const char* scratch) {
  with_shape(job, [&](const auto& shape) { probe_shared(shape, job.keep, begin, end, scratch); });
}
bool nms_settle(const NmsJob& job, const NmsSegment& segment, int64_t begin, int64_t end, char* scratch) {
  bool more = false;
  with_shape(job, [&](const auto& shape) { more = settle_shared(shape, segment, job.keep, begin, end, scratch); });
  return more;
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include "common/threshold.h"
#include "cpu/nms_order.h"

namespace pydl {

PYDL_CPU_DECLARE(void, nms_gather, const NmsJob&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, nms_segment, const NmsJob&, const NmsSegment&, char*)
PYDL_CPU_DECLARE(void, nms_begin, const NmsJob&, const NmsSegment&, char*)
PYDL_CPU_DECLARE(void, nms_probe, const NmsJob&, int64_t, int64_t, const char*)
PYDL_CPU_DECLARE(bool, nms_settle, const NmsJob&, const NmsSegment&, int64_t, int64_t, char*)

namespace {

const NmsKernels kernels() {
  return {PYDL_CPU_DISPATCH(nms_segment), PYDL_CPU_DISPATCH(nms_begin), PYDL_CPU_DISPATCH(nms_probe),
          PYDL_CPU_DISPATCH(nms_settle)};
}

// Which boxes of each image are kept, by the order of their scores.
Ordered suppress(const NmsArrays& in, double threshold, std::optional<double> score_threshold, int64_t most) {
  Ordered ordered = order_by_score(in, score_threshold, most);
  const int64_t n = ordered.positions();
  const Dtype dtype = in.boxes.dtype;
  const int64_t plane = (n + 16) * size_of(compute_dtype(dtype));
  const Scratch planes(5 * plane);
  const auto at = [&](int i) { return planes.get<char>() + i * plane; };
  const NmsJob job{in.boxes.data,
                   ordered.source.data(),
                   at(0),
                   at(1),
                   at(2),
                   at(3),
                   at(4),
                   nullptr,
                   ordered.keep.data(),
                   dtype == Dtype::kDouble ? threshold : double(float_below(threshold)),
                   dtype};
  parallel(n, 8, [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(nms_gather)(job, begin, end); });
  run_segments(job, ordered.segments, kernels());
  return ordered;
}

Tensor nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold) {
  const NmsArrays in("nms", boxes, 4, scores, idxs);
  STD_TORCH_CHECK(in.boxes.dim == 2, "nms: boxes must have shape [N, 4]");
  return suppress(in, iou_threshold, std::nullopt, kEverything).all();
}

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                      double iou_threshold, int64_t max_output, std::optional<double> score_threshold) {
  const NmsArrays in("nms_padded", boxes, 4, scores, idxs);
  STD_TORCH_CHECK(in.boxes.dim == 3, "nms_padded: boxes must have shape [B, N, 4]");
  STD_TORCH_CHECK(max_output >= 0, "nms_padded: max_output must not be negative, got ", max_output);
  return suppress(in, iou_threshold, score_threshold, max_output).padded(max_output);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace
}  // namespace pydl

#endif
