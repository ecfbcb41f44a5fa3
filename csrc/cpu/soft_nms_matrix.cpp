// Matrix NMS (Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", 2020): each box decays by what the boxes
// of higher scores overlap it, less what those are overlapped themselves. All pairs at once, in two passes.
#include "cpu/nms_iou.h"
#include "cpu/soft_nms.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

template <class C>
struct MatrixBoxes {
  C *x1, *y1, *x2, *y2, *area, *covered;

  explicit MatrixBoxes(const MatrixNmsJob& job) {
    C** const planes[] = {&x1, &y1, &x2, &y2, &area, &covered};
    for (int i = 0; i < 6; ++i) *planes[i] = static_cast<C*>(job.planes) + i * soft_nms_room(job.count);
  }
};

// Calls f(i, iou, hit) for vectors of boxes before box j; hit says which overlap it and are of its class.
template <class C, class F>
void each_before(const MatrixNmsJob& job, const MatrixBoxes<C>& b, int64_t j, F&& f) {
  const Vec<C> x1 = splat(b.x1[j]), y1 = splat(b.y1[j]), x2 = splat(b.x2[j]), y2 = splat(b.y2[j]);
  const Vec<C> area = splat(b.area[j]);
  const auto vector = [&](int64_t i, auto extent) {
    // lanes past the end are empty boxes
    const Vec<C> width = min_number(load(b.x2 + i, extent, x1), x2) - max_number(load(b.x1 + i), x1);
    const Vec<C> height = min_number(load(b.y2 + i), y2) - max_number(load(b.y1 + i), y1);
    const Vec<C> inter = overlap_of(width, height);
    if (!any<C>(greater(inter, Vec<C>{}))) return;
    const Vec<C> iou = inter / (load(b.area + i) + area - inter);
    Mask<C> hit = greater(iou, Vec<C>{});
    if (job.sorted_classes != nullptr) hit &= equal_int64<C>(job.sorted_classes + i, job.sorted_classes[j], extent);
    if (any<C>(hit)) f(i, iou, hit);
  };
  int64_t i = 0;
  for (; i + kLanes<C> <= j; i += kLanes<C>) vector(i, Whole{});
  if (i < j) vector(i, Part{j - i});
}

template <class C>
C largest(Vec<C> v) {
  C best = v[0];
  for (int lane = 1; lane < kLanes<C>; ++lane) best = v[lane] > best ? v[lane] : best;
  return best;
}

template <class C>
C covered_part(const MatrixNmsJob& job, const MatrixBoxes<C>& b, int64_t j) {
  Vec<C> most = {};
  each_before<C>(job, b, j,
                 [&](int64_t, Vec<C> iou, Mask<C> hit) { most = max_number(select<C>(hit, iou, Vec<C>{}), most); });
  return largest<C>(most);
}

// The smallest f(iou) / f(covered) and 1. For exp(-sigma x^2) that is the largest iou^2 - covered^2, and one
// exponential.
template <class C, bool GAUSSIAN>
C decay(const MatrixNmsJob& job, const MatrixBoxes<C>& b, int64_t j) {
  Vec<C> most = splat(C(GAUSSIAN ? 0 : -1));
  each_before<C>(job, b, j, [&](int64_t i, Vec<C> iou, Mask<C> hit) {
    const Vec<C> covered = load(b.covered + i);
    if constexpr (GAUSSIAN) {
      const Vec<C> gain = rounded(iou * iou) - rounded(covered * covered);
      most = max_number(select<C>(hit, gain, Vec<C>{}), most);
    } else {
      // a box that is covered altogether has no say
      const Vec<C> ratio = (iou - C(1)) / (C(1) - covered);
      const Mask<C> counts = hit & greater(splat(C(1)), covered);
      most = max_number(select<C>(counts, ratio, splat(C(-1))), most);
    }
  });
  if constexpr (GAUSSIAN) return exp<C>(splat(-C(job.sigma) * largest<C>(most)))[0];
  return -largest<C>(most);
}

// Items are paired so that ranges of them cost the same: the n-th from the front with the n-th from the back.
int64_t balanced(int64_t item, int64_t count) { return item % 2 == 0 ? item / 2 : count - 1 - item / 2; }

template <class C>
void gather_boxes(const MatrixNmsJob& job) {
  const MatrixBoxes<C> b(job);
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t row = job.source[i];
    b.x1[i] = number<C>(job.boxes, job.box_dtype, 4 * row);
    b.y1[i] = number<C>(job.boxes, job.box_dtype, 4 * row + 1);
    b.x2[i] = number<C>(job.boxes, job.box_dtype, 4 * row + 2);
    b.y2[i] = number<C>(job.boxes, job.box_dtype, 4 * row + 3);
    b.area[i] = area_of(b.x1[i], b.y1[i], b.x2[i], b.y2[i]);
    if (job.classes != nullptr) job.sorted_classes[i] = job.classes[row];
  }
}

template <class C>
void decay_scores(const MatrixNmsJob& job, int64_t begin, int64_t end) {
  const MatrixBoxes<C> b(job);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t j = balanced(item, job.count), row = job.source[j];
    const C factor = job.gaussian ? decay<C, true>(job, b, j) : decay<C, false>(job, b, j);
    const C score = number<C>(job.scores, job.score_dtype, row) * factor;
    PYDL_FLOAT_SWITCH(job.score_dtype, from_compute(compute_t<T>(score), static_cast<T*>(job.new_scores) + row));
  }
}

}  // namespace

void matrix_nms_gather(const MatrixNmsJob& job) { job.wide ? gather_boxes<double>(job) : gather_boxes<float>(job); }

void matrix_nms_cover(const MatrixNmsJob& job, int64_t begin, int64_t end) {
  const auto cover = [&]<class C>(C) {
    const MatrixBoxes<C> b(job);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t j = balanced(item, job.count);
      b.covered[j] = covered_part<C>(job, b, j);
    }
  };
  job.wide ? cover(double()) : cover(float());
}

void matrix_nms_decay(const MatrixNmsJob& job, int64_t begin, int64_t end) {
  job.wide ? decay_scores<double>(job, begin, end) : decay_scores<float>(job, begin, end);
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include "cpu/nms_order.h"

namespace pydl {

PYDL_CPU_DECLARE(void, matrix_nms_gather, const MatrixNmsJob&)
PYDL_CPU_DECLARE(void, matrix_nms_cover, const MatrixNmsJob&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, matrix_nms_decay, const MatrixNmsJob&, int64_t, int64_t)

namespace {

Tensor matrix_nms(const Tensor& boxes_in, const Tensor& scores_in, const std::optional<Tensor>& idxs_in, double sigma,
                  bool gaussian) {
  NmsArrays in("matrix_nms", boxes_in, 4, scores_in, idxs_in);
  STD_TORCH_CHECK(in.boxes.dim == 2, "matrix_nms: boxes must have shape [N, 4]");
  const int64_t count = in.count, room = soft_nms_room(count);
  const bool wide = in.boxes.dtype == Dtype::kDouble || in.scores.dtype == Dtype::kDouble;
  const int64_t* const classes = std::exchange(in.classes, nullptr);
  const Ordered ordered = order_by_score(in, std::nullopt, kEverything);
  const Output out = empty(&count, 1, in.scores.dtype);
  if (count == 0) return out.tensor;
  const Scratch planes(6 * room * (wide ? 8 : 4));
  Sizes sorted_classes(classes != nullptr ? size_t(room) : 0);
  const MatrixNmsJob job{
      in.boxes.data, in.scores.data, classes,         ordered.source.data(),
      count,         in.boxes.dtype, in.scores.dtype, wide,
      gaussian,      sigma,          planes.get(),    classes != nullptr ? sorted_classes.data() : nullptr,
      out.data};
  PYDL_CPU_DISPATCH(matrix_nms_gather)(job);
  parallel(count, count, [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(matrix_nms_cover)(job, begin, end); });
  parallel(count, count, [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(matrix_nms_decay)(job, begin, end); });
  return out.tensor;
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("matrix_nms", TORCH_BOX(&matrix_nms)); }

}  // namespace
}  // namespace pydl

#endif
