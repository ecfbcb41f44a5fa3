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

inline PoolDim pool_dim(const char* op, int64_t in, int d, const Sizes& kernel, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation) {
  constexpr int64_t kLimit = int64_t(1) << 31;  // keeps every product below 2^63
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": kernel_size, stride, padding and dilation must have 2 entries each");
  const size_t i = size_t(d);
  STD_TORCH_CHECK(kernel[i] >= 1 && kernel[i] < kLimit, op, ": kernel_size must be positive, got ", kernel[i]);
  STD_TORCH_CHECK(stride[i] >= 1 && stride[i] < kLimit, op, ": stride must be positive, got ", stride[i]);
  STD_TORCH_CHECK(dilation[i] >= 1 && dilation[i] < kLimit, op, ": dilation must be positive, got ", dilation[i]);
  STD_TORCH_CHECK(padding[i] >= 0 && padding[i] <= kernel[i] / 2, op,
                  ": padding must be between 0 and half of kernel_size (", kernel[i], "), got ", padding[i]);
  return {in, 0, kernel[i], stride[i], padding[i], dilation[i]};
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
