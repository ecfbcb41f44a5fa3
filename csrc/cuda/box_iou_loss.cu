// IoU losses of boxes in pairs and their gradients: one thread for each pair, each box read and written once.
#include "cuda/box_device.h"

namespace pydl {
namespace {

// ---- kernels

template <typename T, int KIND>
__global__ void __launch_bounds__(kBoxThreads)
    box_iou_loss_kernel(const T* __restrict__ boxes1, const T* __restrict__ boxes2, acc_t<T>* __restrict__ loss,
                        uint64_t count, acc_t<T> eps, bool aligned) {
  using M = DeviceMath<acc_t<T>>;
  uint64_t item = thread_item();
  if (item >= count) return;
  SizedBox<M> a = sized_box<M, KIND, true>(load_box(boxes1 + 4 * item, aligned));
  SizedBox<M> b = sized_box<M, KIND, true>(load_box(boxes2 + 4 * item, aligned));
  loss[item] = acc_t<T>(1) - box_agreement<M, KIND, true>(a, b, eps);
}

// `uniform`: dloss is one number for all.
template <typename T, int KIND>
__global__ void __launch_bounds__(kBoxThreads)
    box_iou_loss_bwd_kernel(const acc_t<T>* __restrict__ dloss, const T* __restrict__ boxes1,
                            const T* __restrict__ boxes2, T* __restrict__ dboxes1, T* __restrict__ dboxes2,
                            uint64_t count, acc_t<T> eps, bool aligned, bool uniform) {
  using M = DeviceMath<acc_t<T>>;
  uint64_t item = thread_item();
  if (item >= count) return;
  SizedBox<M> a = sized_box<M, KIND, true>(load_box(boxes1 + 4 * item, aligned));
  SizedBox<M> b = sized_box<M, KIND, true>(load_box(boxes2 + 4 * item, aligned));
  BoxOf<M> da, db;
  box_agreement_grad<M, KIND, true>(a, b, eps, -dloss[uniform ? 0 : item], da, db);
  store_box(dboxes1 + 4 * item, da);
  store_box(dboxes2 + 4 * item, db);
}

// ---- host functions

bool are_aligned(const BoxRows& r) { return boxes_aligned(r.boxes1, r.dtype) && boxes_aligned(r.boxes2, r.dtype); }

template <typename T, int KIND>
void launch_loss(const BoxRows& r, void* loss, cudaStream_t stream) {
  PYDL_LAUNCH((box_iou_loss_kernel<T, KIND>), box_grid("box_iou_loss_fwd", r.count), kBoxThreads, 0, stream,
              static_cast<const T*>(r.boxes1), static_cast<const T*>(r.boxes2), static_cast<acc_t<T>*>(loss),
              uint64_t(r.count), acc_t<T>(r.eps), are_aligned(r));
}

template <typename T, int KIND>
void launch_gradients(const BoxRows& r, const void* dloss, bool uniform, void* dboxes1, void* dboxes2,
                      cudaStream_t stream) {
  PYDL_LAUNCH((box_iou_loss_bwd_kernel<T, KIND>), box_grid("box_iou_loss_bwd", r.count), kBoxThreads, 0, stream,
              static_cast<const acc_t<T>*>(dloss), static_cast<const T*>(r.boxes1), static_cast<const T*>(r.boxes2),
              static_cast<T*>(dboxes1), static_cast<T*>(dboxes2), uint64_t(r.count), acc_t<T>(r.eps), are_aligned(r),
              uniform);
}

Tensor box_iou_loss_fwd(const Tensor& boxes1_in, const Tensor& boxes2_in, int64_t kind, double eps) {
  const DeviceGuard guard(boxes1_in);
  guard.check_same("box_iou_loss_fwd", "boxes2", boxes2_in);
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta1(boxes1), meta2(boxes2);
  const BoxRows r = box_rows("box_iou_loss_fwd", meta1, meta2, kind, eps);
  Output loss = empty_on(guard, meta1.sizes, meta1.dim - 1, host::compute_dtype(r.dtype));
  if (r.count == 0) return std::move(loss.tensor);
  PYDL_CUDA_FLOAT_SWITCH(r.dtype, PYDL_BOX_KIND_SWITCH(kind, launch_loss<T, KIND>(r, loss.data, guard.stream())));
  return std::move(loss.tensor);
}

std::tuple<Tensor, Tensor> box_iou_loss_bwd(const Tensor& dloss_in, const Tensor& boxes1_in, const Tensor& boxes2_in,
                                            int64_t kind, double eps) {
  const char* const op = "box_iou_loss_bwd";
  const DeviceGuard guard(dloss_in);
  guard.check_same(op, "boxes1", boxes1_in);
  guard.check_same(op, "boxes2", boxes2_in);
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta1(boxes1), meta2(boxes2);
  const BoxRows r = box_rows(op, meta1, meta2, kind, eps);
  check_row_values(op, "dloss", Array(dloss_in), meta1);
  const bool uniform = is_uniform(Array(dloss_in));
  const Tensor dloss = uniform ? dloss_in : host::as_contiguous(dloss_in);
  const Array dloss_meta(dloss);
  Output dboxes1 = empty_on(guard, meta1.sizes, meta1.dim, r.dtype);
  Output dboxes2 = empty_on(guard, meta1.sizes, meta1.dim, r.dtype);
  if (r.count > 0) {
    PYDL_CUDA_FLOAT_SWITCH(
        r.dtype, PYDL_BOX_KIND_SWITCH(kind, launch_gradients<T, KIND>(r, dloss_meta.data, uniform, dboxes1.data,
                                                                      dboxes2.data, guard.stream())));
  }
  return {std::move(dboxes1.tensor), std::move(dboxes2.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("box_iou_loss_fwd", TORCH_BOX(&box_iou_loss_fwd));
  m.impl("box_iou_loss_bwd", TORCH_BOX(&box_iou_loss_bwd));
}

}  // namespace pydl
