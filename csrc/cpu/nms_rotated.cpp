// Non-maximum suppression of rotated boxes: vectors of bounding rectangles sort pairs out, the rest is decided exactly.
#include "common/rotated_box.h"
#include "cpu/nms_segment.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

// EVERY: the threshold is negative, so that boxes which do not meet count too.
template <bool EVERY>
struct RotatedBoxes {
  using Compute = double;
  static constexpr bool kEveryPair = EVERY;

  Rectangles<double> boxes;
  const double* area;
  const RotatedBox* shapes;
  double threshold, factor;

  explicit RotatedBoxes(const NmsJob& job)
      : boxes{static_cast<double*>(job.x1), static_cast<double*>(job.y1), static_cast<double*>(job.x2),
              static_cast<double*>(job.y2)},
        area(static_cast<const double*>(job.area)),
        shapes(static_cast<const RotatedBox*>(job.shapes)),
        threshold(job.threshold),
        factor(threshold / (1 + threshold) - 1e-9) {}  // less than the areas' rounding can hide

  bool live(int64_t i) const { return EVERY || shapes[i].half_x > 0; }
  double share(int64_t i) const { return factor * area[i]; }

  Probe<double> probe(int64_t i) const {
    const VecD x1 = splat(boxes.x1[i]), y1 = splat(boxes.y1[i]), x2 = splat(boxes.x2[i]), y2 = splat(boxes.y2[i]);
    return {i, x1, y1, x2, y2, splat(area[i]), splat(share(i)), x1, y1, x2, y2};
  }

  bool decide(const KeptGrid<double>& grid, const Probe<double>& p, int64_t slot, VecD, VecD, uint32_t lanes) const {
    for (lanes &= (1u << kLanes<double>)-1; lanes != 0; lanes &= lanes - 1) {
      const int64_t at = slot + __builtin_ctz(lanes);
      if (grid.place[at] >= 0 && rotated_iou(shapes[grid.place[at]], shapes[p.position]) > threshold) return true;
    }
    return false;
  }
};

template <class F>
void with_shape(const NmsJob& job, F&& f) {
  job.threshold < 0 ? f(RotatedBoxes<true>(job)) : f(RotatedBoxes<false>(job));
}

}  // namespace

// Fills shapes, areas and bounding rectangles, a little larger than they are, of positions [begin, end).
void nms_rotated_gather(const NmsJob& job, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(job.dtype, {
    for (int64_t i = begin; i < end; ++i) {
      const T* box = static_cast<const T*>(job.boxes) + 5 * job.source[i];
      const double x = to_compute(box[0]), y = to_compute(box[1]), width = to_compute(box[2]);
      const RotatedBox shape = rotated_box(x, y, width, to_compute(box[3]), to_compute(box[4]));
      const double slack_x = 1e-14 * (shape.half_x + (x < 0 ? -x : x));
      const double slack_y = 1e-14 * (shape.half_y + (y < 0 ? -y : y));
      static_cast<RotatedBox*>(job.shapes)[i] = shape;
      static_cast<double*>(job.x1)[i] = x - shape.half_x - slack_x;
      static_cast<double*>(job.y1)[i] = y - shape.half_y - slack_y;
      static_cast<double*>(job.x2)[i] = x + shape.half_x + slack_x;
      static_cast<double*>(job.y2)[i] = y + shape.half_y + slack_y;
      static_cast<double*>(job.area)[i] = shape.width * shape.height;
    }
  });
}

void nms_rotated_segment(const NmsJob& job, const NmsSegment& segment, char* scratch) {
  with_shape(job, [&](const auto& shape) { settle_segment(shape, segment, job.keep, scratch); });
}
void nms_rotated_begin(const NmsJob& job, const NmsSegment& segment, char* scratch) {
  with_shape(job, [&](const auto& shape) { begin_shared(shape, segment, scratch); });
}
void nms_rotated_probe(const NmsJob& job, int64_t begin, int64_t end, const char* scratch) {
  with_shape(job, [&](const auto& shape) { probe_shared(shape, job.keep, begin, end, scratch); });
}
bool nms_rotated_settle(const NmsJob& job, const NmsSegment& segment, int64_t begin, int64_t end, char* scratch) {
  bool more = false;
  with_shape(job, [&](const auto& shape) { more = settle_shared(shape, segment, job.keep, begin, end, scratch); });
  return more;
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include "cpu/nms_order.h"

namespace pydl {

PYDL_CPU_DECLARE(void, nms_rotated_gather, const NmsJob&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, nms_rotated_segment, const NmsJob&, const NmsSegment&, char*)
PYDL_CPU_DECLARE(void, nms_rotated_begin, const NmsJob&, const NmsSegment&, char*)
PYDL_CPU_DECLARE(void, nms_rotated_probe, const NmsJob&, int64_t, int64_t, const char*)
PYDL_CPU_DECLARE(bool, nms_rotated_settle, const NmsJob&, const NmsSegment&, int64_t, int64_t, char*)

namespace {

Tensor nms_rotated(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold) {
  const NmsArrays in("nms_rotated", boxes, 5, scores, idxs);
  STD_TORCH_CHECK(in.boxes.dim == 2, "nms_rotated: boxes must have shape [N, 5]");
  Ordered ordered = order_by_score(in, std::nullopt, kEverything);
  const int64_t n = ordered.positions(), plane = (n + 16) * int64_t(sizeof(double));
  const Scratch planes(5 * plane), shapes((n + 1) * int64_t(sizeof(RotatedBox)));
  const auto at = [&](int i) { return planes.get<char>() + i * plane; };
  const NmsJob job{in.boxes.data, ordered.source.data(), at(0),         at(1),         at(2), at(3), at(4),
                   shapes.get(),  ordered.keep.data(),   iou_threshold, in.boxes.dtype};
  parallel(n, 64, [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(nms_rotated_gather)(job, begin, end); });
  run_segments(job, ordered.segments,
               {PYDL_CPU_DISPATCH(nms_rotated_segment), PYDL_CPU_DISPATCH(nms_rotated_begin),
                PYDL_CPU_DISPATCH(nms_rotated_probe), PYDL_CPU_DISPATCH(nms_rotated_settle)});
  return ordered.all();
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("nms_rotated", TORCH_BOX(&nms_rotated)); }

}  // namespace
}  // namespace pydl

#endif
