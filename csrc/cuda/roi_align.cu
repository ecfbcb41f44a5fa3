// RoIAlign (He et al., Mask R-CNN, 2017), forward and backward.
#include "cuda/roi_bilinear_bwd.h"

namespace pydl {
namespace {

constexpr int kRoiVectorBytes = 16;

// Whether packs of channels can be read and written whole.
inline bool roi_packs(const RoiShape& s, Dtype dtype, const void* one, const void* other) {
  return s.channels * host::size_of(dtype) % kRoiVectorBytes == 0 && is_aligned(one, kRoiVectorBytes) &&
         is_aligned(other, kRoiVectorBytes);
}

template <typename T>
void run_forward(const RoiForward& f, bool packs) {
  constexpr int N = kRoiVectorBytes / int(sizeof(T));
  if (!f.shape.channels_last) return launch_roi_bilinear<T, RoiMap::kPlanes, 8>(f);
  packs ? launch_roi_bilinear<T, RoiMap::kPacked, N>(f) : launch_roi_bilinear<T, RoiMap::kPacked, 1>(f);
}

template <typename T>
void run_backward(const RoiBackward& f, bool packs) {
  constexpr int N = kRoiVectorBytes / int(sizeof(T));
  constexpr int kChannels = sizeof(T) == 8 ? 8 : 16, kPixels = sizeof(T) == 2 ? 4 : 8;  // sums of a thread: registers
  if (!f.shape.channels_last) return launch_roi_bilinear_bwd<T, RoiMap::kPlanes, kChannels, 1>(f);
  packs ? launch_roi_bilinear_bwd<T, RoiMap::kPacked, N, kPixels>(f)
        : launch_roi_bilinear_bwd<T, RoiMap::kPacked, 1, 8>(f);
}

Tensor roi_align_fwd(const Tensor& x_in, const Tensor& boxes_in, int64_t out_h, int64_t out_w, double scale,
                     int64_t sampling, bool aligned) {
  const char* const op = "roi_align";
  const RoiShape s = roi_shape(op, Array(x_in), Array(boxes_in), out_h, out_w, scale, sampling, aligned);
  check_roi_coordinates(op, s);
  const DeviceGuard guard(x_in);
  guard.check_same(op, "boxes", boxes_in);
  const Tensor x = dense_in(x_in, s.channels_last);
  const RoiInput boxes(boxes_in);
  const Array meta(x);
  Output y = empty_roi(guard, roi_strides(s, s.rois, s.channels, out_h, out_w), meta.dtype);
  if (s.rois * s.channels == 0) return std::move(y.tensor);
  const RoiForward f{op, s, boxes.rows, meta.data, y.data, s.channels, false, guard.stream()};
  PYDL_CUDA_FLOAT_SWITCH(meta.dtype, run_forward<T>(f, roi_packs(s, meta.dtype, meta.data, y.data)));
  return std::move(y.tensor);
}

Tensor roi_align_bwd(const Tensor& dy_in, const Tensor& boxes_in, int64_t batch, int64_t height, int64_t width,
                     double scale, int64_t sampling, bool aligned, bool channels_last) {
  const char* const op = "roi_align_bwd";
  const RoiShape s =
      roi_grad_shape(op, Array(dy_in), Array(boxes_in), batch, height, width, scale, sampling, aligned, channels_last);
  check_roi_coordinates(op, s);
  const DeviceGuard guard(dy_in);
  guard.check_same(op, "boxes", boxes_in);
  const Tensor dy = dense_in(dy_in, channels_last);
  const RoiInput boxes(boxes_in);
  const Array grad(dy);
  Output dx = empty_roi(guard, roi_strides(s, batch, s.channels, height, width), grad.dtype);
  if (batch * s.channels == 0) return std::move(dx.tensor);
  const RoiIndexed<RoiBilinear> indexed(guard, op, s, boxes.rows);
  const RoiBackward f{op, s, boxes.rows, indexed.index, grad.data, dx.data, s.channels, guard.stream()};
  PYDL_CUDA_FLOAT_SWITCH(grad.dtype, run_backward<T>(f, roi_packs(s, grad.dtype, grad.data, dx.data)));
  return std::move(dx.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("roi_align_fwd", TORCH_BOX(&roi_align_fwd));
  m.impl("roi_align_bwd", TORCH_BOX(&roi_align_bwd));
}

}  // namespace pydl
