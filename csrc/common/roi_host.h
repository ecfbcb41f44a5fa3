// What the host functions of RoI pooling share, CPU's and CUDA's: checks of their arguments.
#pragma once

#include "common/pool.h"
#include "common/roi.h"

namespace pydl {
namespace {

constexpr int64_t kRoiLimit = int64_t(1) << 31;

inline void check_roi_sizes(const char* op, const RoiShape& s) {
  STD_TORCH_CHECK(s.height > 0 && s.width > 0 && s.height < kRoiLimit && s.width < kRoiLimit, op,
                  ": height and width must be in [1, 2^31), got ", s.height, " and ", s.width);
  STD_TORCH_CHECK(s.out_h > 0 && s.out_w > 0 && s.out_h < kRoiLimit && s.out_w < kRoiLimit, op,
                  ": output_size must be in [1, 2^31), got ", s.out_h, " and ", s.out_w);
  STD_TORCH_CHECK(s.sampling < kRoiLimit, op, ": sampling_ratio must be below 2^31, got ", s.sampling);
}

inline void check_roi_boxes(const char* op, const Array& boxes) {
  STD_TORCH_CHECK(boxes.dim == 2 && boxes.sizes[1] == 5, op, ": boxes must have shape [K, 5]");
  STD_TORCH_CHECK(boxes.dtype == Dtype::kFloat || boxes.dtype == Dtype::kDouble, op,
                  ": boxes must be float32 or float64");
}

// Shape of the pooling of x; `boxes` is checked.
inline RoiShape roi_shape(const char* op, const Array& x, const Array& boxes, int64_t out_h, int64_t out_w,
                          double scale, int64_t sampling, bool aligned) {
  STD_TORCH_CHECK(x.dim == 4, op, ": x must have 4 dimensions, got ", x.dim);
  STD_TORCH_CHECK(host::is_floating(x.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  check_roi_boxes(op, boxes);
  const RoiShape s{boxes.sizes[0], x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3],           out_h,
                   out_w,          scale,      sampling,   aligned,    like_channels_last(x)};
  check_roi_sizes(op, s);
  return s;
}

// Whether bytes of x are still counted in 64 bits.
inline void check_roi_elements(const char* op, const RoiShape& s) {
  STD_TORCH_CHECK(s.batch == 0 || s.channels <= INT64_MAX / 64 / s.batch / s.height / s.width, op,
                  ": dx would be too large");
}

// Shape of the pooling whose output's gradient is dy.
inline RoiShape roi_grad_shape(const char* op, const Array& dy, const Array& boxes, int64_t batch, int64_t height,
                               int64_t width, double scale, int64_t sampling, bool aligned, bool channels_last) {
  STD_TORCH_CHECK(dy.dim == 4, op, ": dy must have 4 dimensions, got ", dy.dim);
  STD_TORCH_CHECK(host::is_floating(dy.dtype), op, ": dy must be float32, float64, float16 or bfloat16");
  check_roi_boxes(op, boxes);
  STD_TORCH_CHECK(dy.sizes[0] == boxes.sizes[0], op, ": dy must belong to ", boxes.sizes[0], " boxes, got ",
                  dy.sizes[0]);
  STD_TORCH_CHECK(batch >= 0 && batch < kRoiLimit, op, ": batch must be in [0, 2^31), got ", batch);
  const RoiShape s{dy.sizes[0], batch, dy.sizes[1], height,  width,        dy.sizes[2],
                   dy.sizes[3], scale, sampling,    aligned, channels_last};
  check_roi_sizes(op, s);
  check_roi_elements(op, s);
  return s;
}

// Positions in a plane are int32.
inline void check_roi_positions(const char* op, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height > 0 && width > 0 && height < kRoiLimit && width < kRoiLimit && height * width < kRoiLimit, op,
                  ": a plane must have fewer than 2^31 pixels, got ", height, " x ", width);
}

// Shape of the max pooling with these positions, in their layout; `values` are dy or the like.
inline RoiShape roi_argmax_shape(const char* op, const Array& values, const Array& argmax, const Array& boxes,
                                 int64_t batch, int64_t height, int64_t width, double scale) {
  STD_TORCH_CHECK(argmax.dtype == Dtype::kInt32 && argmax.dim == 4, op, ": argmax must be int32 with 4 dimensions");
  STD_TORCH_CHECK(values.dim == 4 && std::equal(values.sizes, values.sizes + 4, argmax.sizes), op,
                  ": dy must have the shape of argmax");
  check_roi_boxes(op, boxes);
  STD_TORCH_CHECK(argmax.sizes[0] == boxes.sizes[0], op, ": argmax must belong to ", boxes.sizes[0], " boxes, got ",
                  argmax.sizes[0]);
  STD_TORCH_CHECK(batch >= 0 && batch < kRoiLimit, op, ": batch must be in [0, 2^31), got ", batch);
  const RoiShape s{argmax.sizes[0],           batch,           argmax.sizes[1], height, width,
                   argmax.sizes[2],           argmax.sizes[3], scale,           0,      false,
                   like_channels_last(argmax)};
  check_roi_sizes(op, s);
  check_roi_positions(op, height, width);
  check_roi_elements(op, s);
  return s;
}

// Channels of the output of a position-sensitive pooling.
inline int64_t ps_roi_channels_of(const char* op, const RoiShape& s) {
  STD_TORCH_CHECK(s.channels % (s.out_h * s.out_w) == 0, op, ": x must have a multiple of ", s.out_h, " x ", s.out_w,
                  " channels, got ", s.channels);
  return s.channels / (s.out_h * s.out_w);
}

// Shape of the position-sensitive pooling whose output's gradient is dy.
inline RoiShape ps_roi_grad_shape(const char* op, const Array& dy, const Array& boxes, int64_t batch, int64_t height,
                                  int64_t width, double scale, int64_t sampling, bool channels_last) {
  RoiShape s = roi_grad_shape(op, dy, boxes, batch, height, width, scale, sampling, true, channels_last);
  STD_TORCH_CHECK(s.channels < kRoiLimit / s.out_h / s.out_w, op, ": dx must have fewer than 2^31 channels, got ",
                  s.channels, " x ", s.out_h, " x ", s.out_w);
  s.channels *= s.out_h * s.out_w;
  check_roi_elements(op, s);
  return s;
}

// [rois, channels, height, width] and the like, in the layout of `s`.
struct RoiStrides {
  int64_t sizes[4], strides[4];
};
inline RoiStrides roi_strides(const RoiShape& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t c1 = std::max<int64_t>(c, 1);
  if (s.channels_last) return {{n, c, h, w}, {h * w * c1, 1, w * c1, c1}};
  return {{n, c, h, w}, {c1 * h * w, h * w, w, 1}};
}

}  // namespace
}  // namespace pydl
