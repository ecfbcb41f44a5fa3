// IoU losses of boxes in pairs and their gradients, each in one pass: boxes are read once, results written once.
#include "cpu/box_vec.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

template <class T, class C, int KIND>
void loss_rows(const BoxRows& r, C* loss, int64_t begin, int64_t end) {
  using M = VecMath<C>;
  const T *boxes1 = static_cast<const T*>(r.boxes1), *boxes2 = static_cast<const T*>(r.boxes2);
  for (int64_t i = begin; i < end; i += kLanes<C>) {
    const auto a = sized_box<M, KIND, true>(load_boxes(boxes1 + 4 * i, end - i));
    const auto b = sized_box<M, KIND, true>(load_boxes(boxes2 + 4 * i, end - i));
    store_lanes(loss + i, C(1) - box_agreement<M, KIND, true>(a, b, C(r.eps)), end - i);
  }
}

template <class T, class C, int KIND>
void loss_gradient_rows(const BoxRows& r, const C* dloss, bool uniform, T* dboxes1, T* dboxes2, int64_t begin,
                        int64_t end) {
  using M = VecMath<C>;
  const T *boxes1 = static_cast<const T*>(r.boxes1), *boxes2 = static_cast<const T*>(r.boxes2);
  for (int64_t i = begin; i < end; i += kLanes<C>) {
    const auto a = sized_box<M, KIND, true>(load_boxes(boxes1 + 4 * i, end - i));
    const auto b = sized_box<M, KIND, true>(load_boxes(boxes2 + 4 * i, end - i));
    const Vec<C> g = uniform ? splat(*dloss) : load_lanes(dloss + i, end - i);
    BoxVec<C> da, db;
    box_agreement_grad<M, KIND, true>(a, b, C(r.eps), -g, da, db);
    store_boxes(dboxes1 + 4 * i, da, end - i);
    store_boxes(dboxes2 + 4 * i, db, end - i);
  }
}

}  // namespace

void box_iou_loss_rows(const BoxRows& r, void* loss, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(r.dtype, PYDL_BOX_KIND_SWITCH(r.kind, loss_rows<T, compute_t<T>, KIND>(
                                                              r, static_cast<compute_t<T>*>(loss), begin, end)));
}

void box_iou_loss_bwd_rows(const BoxRows& r, const void* dloss, bool uniform, void* dboxes1, void* dboxes2,
                           int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(r.dtype,
                    PYDL_BOX_KIND_SWITCH(r.kind, loss_gradient_rows<T, compute_t<T>, KIND>(
                                                     r, static_cast<const compute_t<T>*>(dloss), uniform,
                                                     static_cast<T*>(dboxes1), static_cast<T*>(dboxes2), begin, end)));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, box_iou_loss_rows, const BoxRows&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, box_iou_loss_bwd_rows, const BoxRows&, const void*, bool, void*, void*, int64_t, int64_t)

namespace {

constexpr int64_t kWorkPerPair = 8;

Tensor box_iou_loss_fwd(const Tensor& boxes1_in, const Tensor& boxes2_in, int64_t kind, double eps) {
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta1(boxes1), meta2(boxes2);
  const BoxRows r = box_rows("box_iou_loss_fwd", meta1, meta2, kind, eps);
  Output loss = host::empty(meta1.sizes, meta1.dim - 1, host::compute_dtype(r.dtype));
  host::parallel(r.count, kWorkPerPair,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(box_iou_loss_rows)(r, loss.data, begin, end); });
  return std::move(loss.tensor);
}

std::tuple<Tensor, Tensor> box_iou_loss_bwd(const Tensor& dloss_in, const Tensor& boxes1_in, const Tensor& boxes2_in,
                                            int64_t kind, double eps) {
  const char* const op = "box_iou_loss_bwd";
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta1(boxes1), meta2(boxes2);
  const BoxRows r = box_rows(op, meta1, meta2, kind, eps);
  check_row_values(op, "dloss", Array(dloss_in), meta1);
  // the gradient of a sum or mean is one number, expanded
  const bool uniform = is_uniform(Array(dloss_in));
  const Tensor dloss = uniform ? dloss_in : host::as_contiguous(dloss_in);
  const Array dloss_meta(dloss);
  Output dboxes1 = host::empty(meta1.sizes, meta1.dim, r.dtype), dboxes2 = host::empty(meta1.sizes, meta1.dim, r.dtype);
  host::parallel(r.count, kWorkPerPair, [&](int64_t begin, int64_t end) {
    PYDL_CPU_DISPATCH(box_iou_loss_bwd_rows)
    (r, dloss_meta.data, uniform, dboxes1.data, dboxes2.data, begin, end);
  });
  return {std::move(dboxes1.tensor), std::move(dboxes2.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("box_iou_loss_fwd", TORCH_BOX(&box_iou_loss_fwd));
  m.impl("box_iou_loss_bwd", TORCH_BOX(&box_iou_loss_bwd));
}

}  // namespace
}  // namespace pydl

#endif
