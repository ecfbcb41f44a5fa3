// Small functions of single boxes: areas, conversion between forms, clipping. One thread for each box, one pass.
#include "common/box_form.h"
#include "cuda/box_device.h"

namespace pydl {
namespace {

// ---- kernels

template <typename T>
__global__ void __launch_bounds__(kBoxThreads)
    box_area_kernel(const T* __restrict__ boxes, bool corners, acc_t<T>* __restrict__ areas, uint64_t count,
                    bool aligned) {
  uint64_t item = thread_item();
  if (item >= count) return;
  DeviceBox<T> b = load_box(boxes + 4 * item, aligned);
  areas[item] = corners ? (b.x2 - b.x1) * (b.y2 - b.y1) : b.x2 * b.y2;
}

template <typename T>
__global__ void __launch_bounds__(kBoxThreads)
    box_area_bwd_kernel(const acc_t<T>* __restrict__ dareas, const T* __restrict__ boxes, bool corners,
                        T* __restrict__ dboxes, uint64_t count, bool aligned) {
  uint64_t item = thread_item();
  if (item >= count) return;
  DeviceBox<T> b = load_box(boxes + 4 * item, aligned);
  acc_t<T> zero(0), g = dareas[item];
  acc_t<T> dw = g * (corners ? b.y2 - b.y1 : b.y2), dh = g * (corners ? b.x2 - b.x1 : b.x2);
  store_box(dboxes + 4 * item, DeviceBox<T>{corners ? -dw : zero, corners ? -dh : zero, dw, dh});
}

template <typename T, int64_t FORM>
__global__ void __launch_bounds__(kBoxThreads)
    box_form_kernel(const T* __restrict__ boxes, T* __restrict__ out, uint64_t count, bool aligned) {
  using C = acc_t<T>;
  uint64_t item = thread_item();
  if (item >= count) return;
  DeviceBox<T> b = load_box(boxes + 4 * item, aligned);
  auto x = convert_axis<FORM, C>(b.x1, b.x2), y = convert_axis<FORM, C>(b.y1, b.y2);
  store_box(out + 4 * item, DeviceBox<T>{x.p, y.p, x.q, y.q});
}

// Both comparisons are false for NaN, which stays.
template <typename C>
__device__ __forceinline__ C clip(C x, C bound) {
  C above = x < C(0) ? C(0) : x;
  return above > bound ? bound : above;
}

template <typename T>
__global__ void __launch_bounds__(kBoxThreads)
    box_clip_kernel(const T* __restrict__ boxes, acc_t<T> width, acc_t<T> height, T* __restrict__ out, uint64_t count,
                    bool aligned) {
  uint64_t item = thread_item();
  if (item >= count) return;
  DeviceBox<T> b = load_box(boxes + 4 * item, aligned);
  store_box(out + 4 * item, DeviceBox<T>{clip(b.x1, width), clip(b.y1, height), clip(b.x2, width), clip(b.y2, height)});
}

template <typename C>
__device__ __forceinline__ C if_inside(C dy, C x, C bound) {
  return x >= C(0) && x <= bound ? dy : C(0);
}

template <typename T>
__global__ void __launch_bounds__(kBoxThreads)
    box_clip_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ boxes, acc_t<T> width, acc_t<T> height,
                        T* __restrict__ out, uint64_t count, bool aligned) {
  uint64_t item = thread_item();
  if (item >= count) return;
  DeviceBox<T> g = load_box(dy + 4 * item, aligned), b = load_box(boxes + 4 * item, aligned);
  store_box(out + 4 * item, DeviceBox<T>{if_inside(g.x1, b.x1, width), if_inside(g.y1, b.y1, height),
                                         if_inside(g.x2, b.x2, width), if_inside(g.y2, b.y2, height)});
}

// ---- launchers

template <typename T, int64_t FORM = 0>
void launch_form(const BoxRows& r, void* out, cudaStream_t stream) {
  if constexpr (FORM + 1 < 2 * kBoxForms) {
    if (r.kind != FORM) return launch_form<T, FORM + 1>(r, out, stream);
  }
  PYDL_LAUNCH((box_form_kernel<T, FORM>), box_grid("box_form", r.count), kBoxThreads, 0, stream,
              static_cast<const T*>(r.boxes1), static_cast<T*>(out), uint64_t(r.count),
              boxes_aligned(r.boxes1, r.dtype));
}

// ---- host functions

Tensor box_area_fwd(const Tensor& boxes_in, bool corners) {
  const DeviceGuard guard(boxes_in);
  const Tensor boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  const BoxRows r = single_boxes("box_area_fwd", meta);
  Output areas = empty_on(guard, meta.sizes, meta.dim - 1, host::compute_dtype(r.dtype));
  if (r.count == 0) return std::move(areas.tensor);
  PYDL_CUDA_FLOAT_SWITCH(
      r.dtype, PYDL_LAUNCH(box_area_kernel<T>, box_grid("box_area_fwd", r.count), kBoxThreads, 0, guard.stream(),
                           static_cast<const T*>(r.boxes1), corners, static_cast<acc_t<T>*>(areas.data),
                           uint64_t(r.count), boxes_aligned(r.boxes1, r.dtype)));
  return std::move(areas.tensor);
}

Tensor box_area_bwd(const Tensor& dareas_in, const Tensor& boxes_in, bool corners) {
  const DeviceGuard guard(dareas_in);
  guard.check_same("box_area_bwd", "boxes", boxes_in);
  const Tensor boxes = host::as_contiguous(boxes_in), dareas = host::as_contiguous(dareas_in);
  const Array meta(boxes), dareas_meta(dareas);
  const BoxRows r = single_boxes("box_area_bwd", meta);
  check_row_values("box_area_bwd", "dareas", dareas_meta, meta);
  Output dboxes = empty_on(guard, meta.sizes, meta.dim, r.dtype);
  if (r.count == 0) return std::move(dboxes.tensor);
  PYDL_CUDA_FLOAT_SWITCH(
      r.dtype, PYDL_LAUNCH(box_area_bwd_kernel<T>, box_grid("box_area_bwd", r.count), kBoxThreads, 0, guard.stream(),
                           static_cast<const acc_t<T>*>(dareas_meta.data), static_cast<const T*>(r.boxes1), corners,
                           static_cast<T*>(dboxes.data), uint64_t(r.count), boxes_aligned(r.boxes1, r.dtype)));
  return std::move(dboxes.tensor);
}

Tensor box_form(const Tensor& boxes_in, int64_t form) {
  const DeviceGuard guard(boxes_in);
  const Tensor boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  BoxRows r = single_boxes("box_form", meta);
  r.kind = checked_form(form);
  Output out = empty_on(guard, meta.sizes, meta.dim, r.dtype);
  if (r.count == 0) return std::move(out.tensor);
  PYDL_CUDA_FLOAT_SWITCH(r.dtype, launch_form<T>(r, out.data, guard.stream()));
  return std::move(out.tensor);
}

Tensor box_clip(const Tensor& boxes_in, double width, double height) {
  const DeviceGuard guard(boxes_in);
  const Tensor boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  const BoxRows r = single_boxes("box_clip", meta);
  Output out = empty_on(guard, meta.sizes, meta.dim, r.dtype);
  if (r.count == 0) return std::move(out.tensor);
  PYDL_CUDA_FLOAT_SWITCH(r.dtype,
                         PYDL_LAUNCH(box_clip_kernel<T>, box_grid("box_clip", r.count), kBoxThreads, 0, guard.stream(),
                                     static_cast<const T*>(r.boxes1), acc_t<T>(width), acc_t<T>(height),
                                     static_cast<T*>(out.data), uint64_t(r.count), boxes_aligned(r.boxes1, r.dtype)));
  return std::move(out.tensor);
}

Tensor box_clip_bwd(const Tensor& dy_in, const Tensor& boxes_in, double width, double height) {
  const DeviceGuard guard(dy_in);
  guard.check_same("box_clip_bwd", "boxes", boxes_in);
  const Tensor dy = host::as_contiguous(dy_in), boxes = host::as_contiguous(boxes_in);
  const Array meta(boxes);
  const BoxRows r = box_rows("box_clip_bwd", Array(dy), meta, 0, 0.0);
  Output out = empty_on(guard, meta.sizes, meta.dim, r.dtype);
  if (r.count == 0) return std::move(out.tensor);
  const bool aligned = boxes_aligned(r.boxes1, r.dtype) && boxes_aligned(r.boxes2, r.dtype);
  PYDL_CUDA_FLOAT_SWITCH(
      r.dtype, PYDL_LAUNCH(box_clip_bwd_kernel<T>, box_grid("box_clip_bwd", r.count), kBoxThreads, 0, guard.stream(),
                           static_cast<const T*>(r.boxes1), static_cast<const T*>(r.boxes2), acc_t<T>(width),
                           acc_t<T>(height), static_cast<T*>(out.data), uint64_t(r.count), aligned));
  return std::move(out.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("box_area_fwd", TORCH_BOX(&box_area_fwd));
  m.impl("box_area_bwd", TORCH_BOX(&box_area_bwd));
  m.impl("box_form", TORCH_BOX(&box_form));
  m.impl("box_clip", TORCH_BOX(&box_clip));
  m.impl("box_clip_bwd", TORCH_BOX(&box_clip_bwd));
}

}  // namespace pydl
