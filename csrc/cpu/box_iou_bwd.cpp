// Gradients of the pairwise agreement of boxes, from the boxes and dy alone. Rows are taken in groups cut by the shape;
// a group adds its rows' contributions to boxes2 in order, and the groups' sums are added in order.
#include "cpu/box_vec.h"

namespace pydl {

// What one call needs besides its arguments. Vectors may run past the last box, so rows of m numbers are padded.
struct BoxIouBwd {
  BoxPairs pairs;
  const void* dy;  // [batch, n, m]
  void *dboxes1, *dboxes2;
  void* partial;  // [batch, groups, 4, padded]
  int64_t group_rows, groups, padded;
};

namespace {

constexpr int64_t kFields = 6;     // of boxes2 as vectors: x1, y1, x2, y2, area, angle
constexpr int64_t kFoldCols = 16;  // no vector has more lanes

}  // namespace

namespace PYDL_ISA {
namespace {

template <class C>
SizedBox<VecMath<C>> load_fields(const C* fields, int64_t padded, int64_t j) {
  return {load(fields + j),
          load(fields + padded + j),
          load(fields + 2 * padded + j),
          load(fields + 3 * padded + j),
          load(fields + 4 * padded + j),
          load(fields + 5 * padded + j)};
}

template <class C, int KIND, class T>
void fill_fields(const T* boxes, int64_t count, int64_t padded, C* fields) {
  for (int64_t j = 0; j < count; j += kLanes<C>) {
    const auto box = sized_box<VecMath<C>, KIND, false>(load_boxes(boxes + 4 * j, count - j));
    store(fields + j, box.x1);
    store(fields + padded + j, box.y1);
    store(fields + 2 * padded + j, box.x2);
    store(fields + 3 * padded + j, box.y2);
    store(fields + 4 * padded + j, box.area);
    store(fields + 5 * padded + j, box.angle);
  }
}

template <class C>
void add_to(C* sum, Vec<C> v) {
  store(sum, load(sum) + v);
}

// One row: the gradient of its box is returned, that of the others is added to `sums`, [4][padded]. Lanes past the last
// box have dy = 0, but may be NaN: they are neither added to the row nor read from the sums.
template <class C, int KIND>
BoxOf<VecMath<C>> row_gradient(const SizedBox<VecMath<C>>& box, const C* fields, const C* dy, int64_t m, int64_t padded,
                               C eps, C* sums) {
  BoxOf<VecMath<C>> total{}, da, db;
  for (int64_t j = 0; j < m; j += kLanes<C>) {
    const Vec<C> g = load_lanes(dy + j, m - j);
    box_agreement_grad<VecMath<C>, KIND, false>(box, load_fields(fields, padded, j), eps, g, da, db);
    if (m - j < kLanes<C>) da = first_lanes<C>(da, m - j);
    total = {total.x1 + da.x1, total.y1 + da.y1, total.x2 + da.x2, total.y2 + da.y2};
    add_to(sums + j, db.x1);
    add_to(sums + padded + j, db.y1);
    add_to(sums + 2 * padded + j, db.x2);
    add_to(sums + 3 * padded + j, db.y2);
  }
  return total;
}

template <class T, class C, int KIND>
void gradient_groups(const BoxIouBwd& a, void* scratch, int64_t begin, int64_t end) {
  const BoxPairs& p = a.pairs;
  C* fields = static_cast<C*>(scratch);
  int64_t ready = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t set = item / a.groups, first = item % a.groups * a.group_rows;
    const int64_t last = smaller(first + a.group_rows, p.n);
    if (ready != set) fill_fields<C, KIND>(static_cast<const T*>(p.boxes2) + 4 * set * p.m, p.m, a.padded, fields);
    ready = set;
    C* sums = static_cast<C*>(a.partial) + item * 4 * a.padded;
    for (int64_t j = 0; j < 4 * a.padded; ++j) sums[j] = 0;
    for (int64_t i = set * p.n + first; i < set * p.n + last; ++i) {
      const auto box = sized_box<VecMath<C>, KIND, false>(splat_box(static_cast<const T*>(p.boxes1) + 4 * i));
      const auto total =
          row_gradient<C, KIND>(box, fields, static_cast<const C*>(a.dy) + i * p.m, p.m, a.padded, C(p.eps), sums);
      T* out = static_cast<T*>(a.dboxes1) + 4 * i;
      from_compute(sum(total.x1), out);
      from_compute(sum(total.y1), out + 1);
      from_compute(sum(total.x2), out + 2);
      from_compute(sum(total.y2), out + 3);
    }
  }
}

// Adds the groups' sums for kFoldCols boxes of a set; items are such blocks, set by set.
template <class T, class C>
void fold_groups(const BoxIouBwd& a, int64_t begin, int64_t end) {
  const int64_t m = a.pairs.m, blocks = ceil_div(m, kFoldCols);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t set = item / blocks, first = item % blocks * kFoldCols;
    for (int64_t j = first; j < smaller(first + kFoldCols, m); j += kLanes<C>) {
      const C* partial = static_cast<const C*>(a.partial) + set * a.groups * 4 * a.padded + j;
      BoxVec<C> total{};
      for (int64_t group = 0; group < a.groups; ++group, partial += 4 * a.padded) {
        total.x1 = total.x1 + load(partial);
        total.y1 = total.y1 + load(partial + a.padded);
        total.x2 = total.x2 + load(partial + 2 * a.padded);
        total.y2 = total.y2 + load(partial + 3 * a.padded);
      }
      store_boxes(static_cast<T*>(a.dboxes2) + 4 * (set * m + j), total, m - j);
    }
  }
}

}  // namespace

void box_iou_bwd_groups(const BoxIouBwd& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.pairs.dtype,
                    PYDL_BOX_KIND_SWITCH(a.pairs.kind, gradient_groups<T, compute_t<T>, KIND>(a, scratch, begin, end)));
}

void box_iou_bwd_fold(const BoxIouBwd& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.pairs.dtype, fold_groups<T, compute_t<T>>(a, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, box_iou_bwd_groups, const BoxIouBwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, box_iou_bwd_fold, const BoxIouBwd&, int64_t, int64_t)

namespace {

std::tuple<Tensor, Tensor> box_iou_bwd(const Tensor& dy_in, const Tensor& boxes1_in, const Tensor& boxes2_in,
                                       int64_t kind, double eps) {
  const char* const op = "box_iou_bwd";
  const Tensor dy = host::as_contiguous(dy_in);
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta(dy), meta1(boxes1), meta2(boxes2);
  const BoxPairs p = box_pairs(op, meta1, meta2, kind, eps);
  check_pair_gradient(op, meta, p, meta1.dim);
  Output dboxes1 = host::empty(meta1.sizes, meta1.dim, p.dtype), dboxes2 = host::empty(meta2.sizes, meta2.dim, p.dtype);
  const int64_t element = host::size_of(host::compute_dtype(p.dtype));
  BoxIouBwd a{p,
              meta.data,
              dboxes1.data,
              dboxes2.data,
              nullptr,
              rows_per_partial(p.n),
              0,
              (p.m + kFoldCols - 1) / kFoldCols * kFoldCols};
  a.groups = (p.n + a.group_rows - 1) / a.group_rows;
  const host::Scratch partial(p.batch * a.groups * 4 * a.padded * element);
  a.partial = partial.get();
  host::parallel(p.batch * a.groups, a.group_rows * p.m * 4, [&](int64_t begin, int64_t end) {
    const host::Scratch fields(kFields * a.padded * element);
    PYDL_CPU_DISPATCH(box_iou_bwd_groups)(a, fields.get(), begin, end);
  });
  host::parallel(p.batch * (a.padded / kFoldCols), a.groups * 4 * kFoldCols,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(box_iou_bwd_fold)(a, begin, end); });
  return {std::move(dboxes1.tensor), std::move(dboxes2.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("box_iou_bwd", TORCH_BOX(&box_iou_bwd)); }

}  // namespace
}  // namespace pydl

#endif
