// What the files of pooling share: the geometry of a pooling over one to three dimensions and its arguments. The first
// part is plain and is compiled at every ISA level, and for a GPU.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

#ifdef __CUDACC__
#define PYDL_POOL_FUNCTION __host__ __device__ inline
#else
#define PYDL_POOL_FUNCTION inline
#endif

// One spatial dimension: output o reads inputs o * stride - padding + tap * dilation for tap in [0, kernel), or, if
// adaptive, inputs [floor(o * in / out), ceil((o + 1) * in / out)).
struct PoolDim {
  int64_t in, out, kernel, stride, padding, dilation;
  bool adaptive = false;
};

// Dimensions that a tensor lacks have size 1, so that every pooling is one over three.
struct PoolShape {
  int64_t batch, channels;
  PoolDim d, h, w;
  bool channels_last;
  int64_t dims;
};

// Positions [first, last).
template <class I>
struct Span {
  I first, last;
};

// Mean pooling: forward from x to y; backward, its transpose, from dy to dx.
struct PoolMean {
  PoolShape shape;
  const void* from;
  void* to;
  bool include_padding;
  int64_t divisor;  // 0: what the window counts
  Dtype dtype;
  int64_t tile_rows, tile_cols;  // written together (contiguous layout)
  int64_t channel_block;         // written together (channels-last layout)
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

namespace {

// Inputs in the window of output o, whose taps are neighbours. D is PoolDim or its 32-bit copy on a device.
template <class D, class I>
PYDL_POOL_FUNCTION Span<I> inputs_of(const D& d, I o) {
  if (d.adaptive) return {I(int64_t(o) * d.in / d.out), I((int64_t(o + 1) * d.in + d.out - 1) / d.out)};
  const I start = o * d.stride - d.padding, end = start + d.kernel;
  return {start > 0 ? start : 0, end < d.in ? end : d.in};
}

// Outputs whose windows hold input i; none if first >= last.
template <class D, class I>
PYDL_POOL_FUNCTION Span<I> outputs_of(const D& d, I i) {
  if (d.adaptive) return {I(int64_t(i) * d.out / d.in), I((int64_t(i + 1) * d.out + d.in - 1) / d.in)};
  const I reach = i + d.padding - d.kernel + 1, last = (i + d.padding) / d.stride + 1;
  return {reach > 0 ? (reach + d.stride - 1) / d.stride : 0, last < d.out ? last : d.out};
}

// How many elements of output o's window a mean counts along one dimension.
template <class D, class I>
PYDL_POOL_FUNCTION I counted(const D& d, I o, bool include_padding) {
  const Span<I> inside = inputs_of(d, o);
  if (d.adaptive || !include_padding) return inside.last - inside.first;
  const I start = o * d.stride - d.padding, end = start + d.kernel, border = d.in + d.padding;
  return (end < border ? end : border) - start;
}

}  // namespace
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

inline constexpr PoolDim kNoDim{1, 1, 1, 1, 0, 1};

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

// Dimensions of a tensor from the least to the greatest stride.
inline void memory_order(int64_t dim, bool channels_last, int64_t* order) {
  if (channels_last) *order++ = 1;
  for (int64_t i = dim - 1; i > (channels_last ? 1 : 0); --i) *order++ = i;
  *order = 0;
}

// torch's choice of memory format: channels_last if the strides descend in the order N, spatial dimensions, C.
inline bool like_channels_last(const Array& x) {
  if (x.strides[1] == 0) return false;
  int64_t least = 0, order[5];
  memory_order(x.dim, true, order);
  for (int64_t i = 0; i < x.dim; ++i) {
    const int64_t d = order[i];
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
  PoolShape s{meta.sizes[0],
              meta.sizes[1],
              kNoDim,
              pool_dim(op, meta.sizes[2], 0, window),
              pool_dim(op, meta.sizes[3], 1, window),
              like_channels_last(meta),
              2};
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
  PoolShape s{indices.sizes[0],
              indices.sizes[1],
              kNoDim,
              pool_dim(op, height, 0, window),
              pool_dim(op, width, 1, window),
              like_channels_last(indices),
              2};
  s.h.out = indices.sizes[2];
  s.w.out = indices.sizes[3];
  for (const PoolDim* d : {&s.h, &s.w}) {
    STD_TORCH_CHECK(d->out < INT64_MAX / 2 / d->stride, op, ": indices are too large, got size ", d->out);
  }
  return s;
}

// The geometry of a mean over the windows of `given`, its input or (backward) its output. `window` holds the other
// side's sizes, then kernel_size, stride and padding unless the windows are adaptive.
inline PoolShape mean_shape(const char* op, const Tensor& tensor, const Sizes& window, bool forward) {
  constexpr int64_t kLimit = int64_t(1) << 31;  // keeps every product below 2^63
  const Array given(tensor);
  const int64_t dims = given.dim - 2;
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, op, ": the tensor must have 3 to 5 dimensions, got ", given.dim);
  STD_TORCH_CHECK(host::is_floating(given.dtype), op, ": the tensor must be float32, float64, float16 or bfloat16");
  const bool adaptive = int64_t(window.size()) == dims;
  STD_TORCH_CHECK(adaptive || int64_t(window.size()) == 4 * dims, op, ": window must have ", dims, " or ", 4 * dims,
                  " entries, got ", window.size());
  PoolShape s{given.sizes[0], given.sizes[1], kNoDim, kNoDim, kNoDim, like_channels_last(given), dims};
  PoolDim* const axes[3] = {&s.d, &s.h, &s.w};
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t own = given.sizes[2 + i], other = window[size_t(i)], in = forward ? own : other;
    const int64_t out = forward ? other : own;
    STD_TORCH_CHECK(in >= 1 && in < kLimit && out >= 0 && out < kLimit, op,
                    ": sizes must be in [1, 2^31) before and in [0, 2^31) after pooling, got ", in, " and ", out);
    PoolDim& d = *axes[3 - dims + i];
    if (!adaptive) {
      const auto entry = [&](int64_t k) { return window[size_t(k * dims + i)]; };
      d = {in, out, entry(1), entry(2), entry(3), 1};
      STD_TORCH_CHECK(d.kernel >= 1 && d.kernel < kLimit && d.stride >= 1 && d.stride < kLimit && d.padding >= 0 &&
                          d.padding <= d.kernel / 2,
                      op,
                      ": kernel_size and stride must be in [1, 2^31), padding between 0 and half of kernel_size, got ",
                      d.kernel, ", ", d.stride, " and ", d.padding);
      STD_TORCH_CHECK(out >= 1 && (out - 1) * d.stride < in + d.padding, op, ": ", out,
                      " windows reach past an input of size ", in);
    } else if (out > 0 && in % out == 0) {
      d = {in, out, in / out, in / out, 0, 1};
    } else {
      d = {in, out, 0, 0, 0, 1, true};
    }
  }
  return s;
}

inline bool dense(const Array& x, bool channels_last) {
  int64_t expected = 1, order[5];
  memory_order(x.dim, channels_last, order);
  for (int64_t i = 0; i < x.dim; ++i) {
    const int64_t d = order[i];
    if (x.sizes[d] == 0) return true;
    if (x.sizes[d] != 1 && x.strides[d] != expected) return false;
    expected *= x.sizes[d];
  }
  return true;
}

inline Tensor dense_in(const Tensor& x, bool channels_last) {
  using host::MemoryFormat;
  const Array meta(x);
  if (dense(meta, channels_last)) return x;
  if (channels_last && meta.dim == 3) {  // torch has no name for this layout
    return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(x, 1, 2)), 1, 2);
  }
  const MemoryFormat last = meta.dim == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  return torch::stable::contiguous(x, channels_last ? last : MemoryFormat::Contiguous);
}

// Sizes and strides of a dense tensor of one side of a pooling.
struct PoolLayout {
  int64_t sizes[5], strides[5], dim;
};
inline PoolLayout pool_layout(const PoolShape& s, bool outputs) {
  PoolLayout layout{{s.batch, s.channels}, {}, s.dims + 2};
  const PoolDim* const axes[3] = {&s.d, &s.h, &s.w};
  for (int64_t i = 0; i < s.dims; ++i) {
    const PoolDim& d = *axes[3 - s.dims + i];
    layout.sizes[2 + i] = outputs ? d.out : d.in;
  }
  int64_t expected = 1, order[5];
  memory_order(layout.dim, s.channels_last, order);
  for (int64_t i = 0; i < layout.dim; ++i) {
    layout.strides[order[i]] = expected;
    expected *= std::max<int64_t>(layout.sizes[order[i]], 1);
  }
  return layout;
}

inline Output empty_pool(const PoolShape& s, bool outputs, Dtype dtype) {
  const PoolLayout layout = pool_layout(s, outputs);
  return host::empty_strided(layout.sizes, layout.strides, layout.dim, dtype);
}

}  // namespace
}  // namespace pydl

#endif
