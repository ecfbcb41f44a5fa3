// Position-sensitive RoIAlign (Dai et al., R-FCN, 2016), forward and backward.
#include "cuda/roi_bilinear_bwd.h"

namespace pydl {
namespace {

constexpr int kChannels = 4;  // of a thread

Tensor ps_roi_align_fwd(const Tensor& x_in, const Tensor& boxes_in, int64_t out_h, int64_t out_w, double scale,
                        int64_t sampling) {
  const char* const op = "ps_roi_align";
  const RoiShape s = roi_shape(op, Array(x_in), Array(boxes_in), out_h, out_w, scale, sampling, true);
  check_roi_coordinates(op, s);
  const int64_t channels = ps_roi_channels_of(op, s);
  const DeviceGuard guard(x_in);
  guard.check_same(op, "boxes", boxes_in);
  const Tensor x = dense_in(x_in, s.channels_last);
  const RoiInput boxes(boxes_in);
  const Array meta(x);
  Output y = empty_roi(guard, roi_strides(s, s.rois, channels, out_h, out_w), meta.dtype);
  if (s.rois * channels == 0) return std::move(y.tensor);
  const RoiForward f{op, s, boxes.rows, meta.data, y.data, channels, true, guard.stream()};
  PYDL_CUDA_FLOAT_SWITCH(meta.dtype, launch_roi_bilinear<T, RoiMap::kSplit, kChannels>(f));
  return std::move(y.tensor);
}

Tensor ps_roi_align_bwd(const Tensor& dy_in, const Tensor& boxes_in, int64_t batch, int64_t height, int64_t width,
                        double scale, int64_t sampling, bool channels_last) {
  const char* const op = "ps_roi_align_bwd";
  const RoiShape s =
      ps_roi_grad_shape(op, Array(dy_in), Array(boxes_in), batch, height, width, scale, sampling, channels_last);
  check_roi_coordinates(op, s);
  const DeviceGuard guard(dy_in);
  guard.check_same(op, "boxes", boxes_in);
  const Tensor dy = dense_in(dy_in, channels_last);
  const RoiInput boxes(boxes_in);
  const Array grad(dy);
  Output dx = empty_roi(guard, roi_strides(s, batch, s.channels, height, width), grad.dtype);
  if (batch * s.channels == 0) return std::move(dx.tensor);
  const RoiIndexed<RoiBilinear> indexed(guard, op, s, boxes.rows);
  const RoiBackward f{op, s, boxes.rows, indexed.index, grad.data, dx.data, grad.sizes[1], guard.stream()};
  PYDL_CUDA_FLOAT_SWITCH(grad.dtype, launch_roi_bilinear_bwd<T, RoiMap::kSplit, kChannels, 1>(f));
  return std::move(dx.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("ps_roi_align_fwd", TORCH_BOX(&ps_roi_align_fwd));
  m.impl("ps_roi_align_bwd", TORCH_BOX(&ps_roi_align_bwd));
}

}  // namespace pydl
