// What the files of max pooling share: the geometry of a pooling and its arguments. The first part is plain data and is
// compiled at every ISA level.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

// One spatial dimension: output o reads inputs o * stride - padding + tap * dilation for tap in [0, kernel).
struct PoolDim {
  int64_t in, out, kernel, stride, padding, dilation;
};

struct PoolShape {
  int64_t batch, channels;
  PoolDim h, w;
  bool channels_last;
};

struct PoolFwd {
  PoolShape shape;
  const void* x;
  void* y;
  void* indices;            // null: values only
  const int64_t* flat_tap;  // flat: where in a plane a tap lies, by its number, from the window's origin
  bool flat;                // indices are int64 positions in a plane, else uint8 numbers of taps
  Dtype dtype;
  int64_t tile_rows, tile_cols;  // outputs computed together (contiguous layout)
};

struct PoolBwd {
  PoolShape shape;
  const void* dy;  // bwd: gradient of y; gather: x
  const void* indices;
  void* dx;  // bwd: gradient of x; gather: y
  bool flat;
  Dtype dtype;
};

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

#include "common/host.h"

namespace pydl {
namespace {

using host::Array;
using host::Output;
using host::Sizes;
using host::Tensor;

// Taps of a window fit into the 8 bits of an offset.
inline bool offsets_fit(const PoolShape& s) { return s.h.kernel * s.w.kernel <= 255; }

// Taps of a window that can lie inside the input: the work behind an output.
inline int64_t inner_window(const PoolShape& s) { return std::min(s.h.kernel, s.h.in) * std::min(s.w.kernel, s.w.in); }

// One dimension (0 height, 1 width) of a pooling; `window` is kernel_size, stride, padding and dilation, two of each.
// One list, because each list argument costs a microsecond on its way through the dispatcher.
inline PoolDim pool_dim(const char* op, int64_t in, size_t d, const Sizes& window) {
  constexpr int64_t kLimit = int64_t(1) << 31;  // keeps every product below 2^63
  STD_TORCH_CHECK(window.size() == 8, op, ": window must have 8 entries, got ", window.size());
  const int64_t kernel = window[d], stride = window[2 + d], padding = window[4 + d], dilation = window[6 + d];
  STD_TORCH_CHECK(kernel >= 1 && kernel < kLimit, op, ": kernel_size must be in [1, 2^31), got ", kernel);
  STD_TORCH_CHECK(stride >= 1 && stride < kLimit, op, ": stride must be in [1, 2^31), got ", stride);
  STD_TORCH_CHECK(dilation >= 1 && dilation < kLimit, op, ": dilation must be in [1, 2^31), got ", dilation);
  STD_TORCH_CHECK(padding >= 0 && padding <= kernel / 2, op, ": padding must be between 0 and half of kernel_size (",
                  kernel, "), got ", padding);
  return {in, 0, kernel, stride, padding, dilation};
}

// torch's rule: with ceil_mode a last window may hang over the right padding but must start inside the input or the
// left padding.
inline int64_t pooled_size(const PoolDim& d, bool ceil_mode) {
  const int64_t span = d.in + 2 * d.padding - d.dilation * (d.kernel - 1) - 1 + (ceil_mode ? d.stride - 1 : 0);
  int64_t out = (span >= 0 ? span / d.stride : -((-span + d.stride - 1) / d.stride)) + 1;
  if (ceil_mode && (out - 1) * d.stride >= d.in + d.padding) --out;
  return out;
}

// torch's choice of memory format for a 4-D tensor: channels_last if its strides descend in the order N, H, W, C.
inline bool like_channels_last(const Array& x) {
  if (x.strides[1] == 0) return false;
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.sizes[d] == 0 || x.strides[d] < least) return false;
    if (d == 0 && least == x.strides[1]) return false;  // N,1,1,1 and the like: ambiguous, taken as contiguous
    least = x.strides[d] * (x.sizes[d] > 1 ? x.sizes[d] : 1);
  }
  return true;
}

// Shape of the pooling of x.
inline PoolShape forward_shape(const char* op, const Tensor& x, const Sizes& window, bool ceil_mode) {
  const Array meta(x);
  STD_TORCH_CHECK(meta.dim == 4, op, ": x must have 4 dimensions, got ", meta.dim);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  PoolShape s{meta.sizes[0], meta.sizes[1], pool_dim(op, meta.sizes[2], 0, window),
              pool_dim(op, meta.sizes[3], 1, window), like_channels_last(meta)};
  s.h.out = pooled_size(s.h, ceil_mode);
  s.w.out = pooled_size(s.w, ceil_mode);
  STD_TORCH_CHECK(s.h.in > 0 && s.w.in > 0 && s.h.out > 0 && s.w.out > 0, op, ": x of ", s.h.in, " x ", s.w.in,
                  " is too small for kernel_size ", s.h.kernel, " x ", s.w.kernel, ": the output would be ", s.h.out,
                  " x ", s.w.out);
  return s;
}

// Shape of the pooling of a height x width input that gave `indices`.
inline PoolShape index_shape(const char* op, const Array& indices, int64_t height, int64_t width, const Sizes& window) {
  STD_TORCH_CHECK(indices.dim == 4, op, ": indices must have 4 dimensions, got ", indices.dim);
  STD_TORCH_CHECK(indices.dtype == Dtype::kUInt8 || indices.dtype == Dtype::kInt64, op,
                  ": indices must be uint8 or int64");
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= INT64_MAX / width, op,
                  ": height and width must be positive, got ", height, " and ", width);
  PoolShape s{indices.sizes[0], indices.sizes[1], pool_dim(op, height, 0, window), pool_dim(op, width, 1, window),
              like_channels_last(indices)};
  s.h.out = indices.sizes[2];
  s.w.out = indices.sizes[3];
  for (const PoolDim* d : {&s.h, &s.w}) {
    STD_TORCH_CHECK(d->out < INT64_MAX / 2 / d->stride, op, ": indices are too large, got size ", d->out);
  }
  return s;
}

inline bool dense(const Array& x, bool channels_last) {
  if (!channels_last) return x.contiguous();
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.sizes[d] == 0) return true;
    if (x.sizes[d] != 1 && x.strides[d] != expected) return false;
    expected *= x.sizes[d];
  }
  return true;
}

inline Tensor dense_in(const Tensor& x, bool channels_last) {
  using host::MemoryFormat;
  if (dense(Array(x), channels_last)) return x;
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Output empty_pool(const PoolShape& s, int64_t h, int64_t w, Dtype dtype) {
  const int64_t c = s.channels, sizes[4] = {s.batch, c, h, w};
  const int64_t c1 = std::max<int64_t>(c, 1), h1 = std::max<int64_t>(h, 1), w1 = std::max<int64_t>(w, 1);
  const int64_t last[4] = {h1 * w1 * c1, 1, w1 * c1, c1}, first[4] = {c1 * h1 * w1, h1 * w1, w1, 1};
  return host::empty_strided(sizes, s.channels_last ? last : first, 4, dtype);
}

}  // namespace
}  // namespace pydl

#endif
