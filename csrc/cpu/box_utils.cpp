// Small functions of single boxes: areas, conversion between forms, clipping, and which boxes are large enough. Each is
// one pass over memory.
#include "common/box_form.h"
#include "cpu/box_vec.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

template <class T>
void area_rows(const T* boxes, bool corners, compute_t<T>* areas, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t i = begin; i < end; i += kLanes<C>) {
    const BoxVec<C> b = load_boxes(boxes + 4 * i, end - i);
    store_lanes(areas + i, corners ? (b.x2 - b.x1) * (b.y2 - b.y1) : b.x2 * b.y2, end - i);
  }
}

template <class T>
void area_gradient_rows(const compute_t<T>* dareas, const T* boxes, bool corners, T* dboxes, int64_t begin,
                        int64_t end) {
  using C = compute_t<T>;
  for (int64_t i = begin; i < end; i += kLanes<C>) {
    const BoxVec<C> b = load_boxes(boxes + 4 * i, end - i);
    const Vec<C> g = load_lanes(dareas + i, end - i), zero = {};
    const Vec<C> dw = g * (corners ? b.y2 - b.y1 : b.y2), dh = g * (corners ? b.x2 - b.x1 : b.x2);
    const BoxVec<C> out{corners ? -dw : zero, corners ? -dh : zero, dw, dh};
    store_boxes(dboxes + 4 * i, out, end - i);
  }
}

template <class T, int64_t FORM = 0>
void convert_rows(const T* boxes, int64_t form, T* out, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  if constexpr (FORM + 1 < 2 * kBoxForms) {
    if (form != FORM) return convert_rows<T, FORM + 1>(boxes, form, out, begin, end);
  }
  for (int64_t i = begin; i < end; i += kLanes<C>) {
    const BoxVec<C> b = load_boxes(boxes + 4 * i, end - i);
    const auto x = convert_axis<FORM, C>(b.x1, b.x2), y = convert_axis<FORM, C>(b.y1, b.y2);
    store_boxes(out + 4 * i, {x.p, y.p, x.q, y.q}, end - i);
  }
}

// Bounds of x, y, x, y, ...
template <class C>
Vec<C> alternate_bounds(double width, double height) {
  return interleave_low(splat(C(width)), splat(C(height)));
}

// Elements [begin, end), both multiples of four. A NaN is the second operand, and stays.
template <class T>
void clip_elements(const T* boxes, double width, double height, T* out, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const Vec<C> bounds = alternate_bounds<C>(width, height), zero = {};
  for (int64_t i = begin; i < end; i += kLanes<C>) {
    store_lanes(out + i, min_number(bounds, max_number(zero, load_lanes(boxes + i, end - i))), end - i);
  }
}

template <class T>
void clip_gradient_elements(const T* dy, const T* boxes, double width, double height, T* out, int64_t begin,
                            int64_t end) {
  using C = compute_t<T>;
  const Vec<C> bounds = alternate_bounds<C>(width, height), zero = {};
  for (int64_t i = begin; i < end; i += kLanes<C>) {
    const Vec<C> x = load_lanes(boxes + i, end - i);
    const Vec<C> below = select<C>(greater(zero, x), zero, load_lanes(dy + i, end - i));
    const Vec<C> inside = select<C>(greater(x, bounds), zero, below);
    store_lanes(out + i, select<C>(is_nan(x), zero, inside), end - i);
  }
}

template <class T>
int64_t large_rows(const T* boxes, compute_t<T> least, int64_t* kept, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* b = boxes + 4 * i;
    kept[found] = i;
    found +=
        int64_t(to_compute(b[2]) - to_compute(b[0]) >= least) & int64_t(to_compute(b[3]) - to_compute(b[1]) >= least);
  }
  return found;
}

}  // namespace

void box_areas(const BoxRows& r, bool corners, void* areas, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(r.dtype,
                    area_rows(static_cast<const T*>(r.boxes1), corners, static_cast<compute_t<T>*>(areas), begin, end));
}

void box_area_gradients(const BoxRows& r, const void* dareas, bool corners, void* dboxes, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(
      r.dtype, area_gradient_rows(static_cast<const compute_t<T>*>(dareas), static_cast<const T*>(r.boxes1), corners,
                                  static_cast<T*>(dboxes), begin, end));
}

void box_conversions(const BoxRows& r, void* out, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(r.dtype, convert_rows(static_cast<const T*>(r.boxes1), r.kind, static_cast<T*>(out), begin, end));
}

void box_clips(const BoxRows& r, double width, double height, void* out, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(
      r.dtype, clip_elements(static_cast<const T*>(r.boxes1), width, height, static_cast<T*>(out), 4 * begin, 4 * end));
}

void box_clip_gradients(const BoxRows& r, double width, double height, void* out, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(r.dtype, clip_gradient_elements(static_cast<const T*>(r.boxes1), static_cast<const T*>(r.boxes2),
                                                    width, height, static_cast<T*>(out), 4 * begin, 4 * end));
}

int64_t box_large_rows(const BoxRows& r, double least, int64_t* kept) {
  PYDL_FLOAT_SWITCH(r.dtype, return large_rows(static_cast<const T*>(r.boxes1), compute_t<T>(least), kept, r.count));
  return 0;
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, box_areas, const BoxRows&, bool, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, box_area_gradients, const BoxRows&, const void*, bool, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, box_conversions, const BoxRows&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, box_clips, const BoxRows&, double, double, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, box_clip_gradients, const BoxRows&, double, double, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(int64_t, box_large_rows, const BoxRows&, double, int64_t*)

namespace {

constexpr int64_t kWorkPerBox = 4;

Tensor box_area_fwd(const Tensor& boxes_in, bool corners) {
  const Tensor boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  const BoxRows r = single_boxes("box_area_fwd", meta);
  Output areas = host::empty(meta.sizes, meta.dim - 1, host::compute_dtype(r.dtype));
  host::parallel(r.count, kWorkPerBox,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(box_areas)(r, corners, areas.data, begin, end); });
  return std::move(areas.tensor);
}

Tensor box_area_bwd(const Tensor& dareas_in, const Tensor& boxes_in, bool corners) {
  const Tensor boxes = host::as_contiguous(boxes_in), dareas = host::as_contiguous(dareas_in);
  const Array meta(boxes), dareas_meta(dareas);
  const BoxRows r = single_boxes("box_area_bwd", meta);
  check_row_values("box_area_bwd", "dareas", dareas_meta, meta);
  Output dboxes = host::empty(meta.sizes, meta.dim, r.dtype);
  host::parallel(r.count, kWorkPerBox, [&](int64_t begin, int64_t end) {
    PYDL_CPU_DISPATCH(box_area_gradients)(r, dareas_meta.data, corners, dboxes.data, begin, end);
  });
  return std::move(dboxes.tensor);
}

Tensor box_form(const Tensor& boxes_in, int64_t form) {
  const Tensor boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  BoxRows r = single_boxes("box_form", meta);
  r.kind = checked_form(form);
  Output out = host::empty(meta.sizes, meta.dim, r.dtype);
  host::parallel(r.count, kWorkPerBox,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(box_conversions)(r, out.data, begin, end); });
  return std::move(out.tensor);
}

Tensor box_clip(const Tensor& boxes_in, double width, double height) {
  const Tensor boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  const BoxRows r = single_boxes("box_clip", meta);
  Output out = host::empty(meta.sizes, meta.dim, r.dtype);
  host::parallel(r.count, kWorkPerBox, [&](int64_t begin, int64_t end) {
    PYDL_CPU_DISPATCH(box_clips)(r, width, height, out.data, begin, end);
  });
  return std::move(out.tensor);
}

Tensor box_clip_bwd(const Tensor& dy_in, const Tensor& boxes_in, double width, double height) {
  const Tensor dy = host::as_contiguous(dy_in), boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  const BoxRows r = box_rows("box_clip_bwd", Array(dy), meta, 0, 0.0);
  Output out = host::empty(meta.sizes, meta.dim, r.dtype);
  host::parallel(r.count, kWorkPerBox, [&](int64_t begin, int64_t end) {
    PYDL_CPU_DISPATCH(box_clip_gradients)(r, width, height, out.data, begin, end);
  });
  return std::move(out.tensor);
}

Tensor box_large(const Tensor& boxes_in, double least) {
  const Tensor boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  STD_TORCH_CHECK(meta.dim == 2, "box_large: boxes must have shape [N, 4], got ", meta.dim, " dimensions");
  const BoxRows r = single_boxes("box_large", meta);
  const host::Scratch kept((r.count + 1) * int64_t(sizeof(int64_t)));
  const int64_t found = PYDL_CPU_DISPATCH(box_large_rows)(r, least, kept.get<int64_t>());
  Output out = host::empty(&found, 1, Dtype::kInt64);
  if (found > 0) std::memcpy(out.data, kept.get(), size_t(found) * sizeof(int64_t));
  return std::move(out.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("box_area_fwd", TORCH_BOX(&box_area_fwd));
  m.impl("box_area_bwd", TORCH_BOX(&box_area_bwd));
  m.impl("box_form", TORCH_BOX(&box_form));
  m.impl("box_clip", TORCH_BOX(&box_clip));
  m.impl("box_clip_bwd", TORCH_BOX(&box_clip_bwd));
  m.impl("box_large", TORCH_BOX(&box_large));
}

}  // namespace
}  // namespace pydl

#endif
