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
// adaptive, inputs [floor(o * in / out), ceil((o + 1) * in / out)), of which kernel bounds the number.
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
  int64_t tile_rows = 0, tile_cols = 0;  // outputs computed together (contiguous layout)
  int64_t tile_bytes = 0;                // memory that a tile needs
  int64_t slice_tiles = 0;               // tiles of one depth of a volume
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

// The input that tap 0 of output o reads.
template <class D, class I>
PYDL_POOL_FUNCTION I window_start(const D& d, I o) {
  return d.adaptive ? I(int64_t(o) * d.in / d.out) : o * d.stride - d.padding;
}

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

// Taps of output o that lie inside the input; first is the number of those before it.
template <class D, class I>
PYDL_POOL_FUNCTION Span<I> inner_taps(const D& d, I o) {
  if (d.adaptive) {
    const Span<I> inside = inputs_of(d, o);
    return {0, inside.last - inside.first};
  }
  const I start = o * d.stride - d.padding, first = start < 0 ? (-start + d.dilation - 1) / d.dilation : 0;
  I last = start < d.in ? (d.in - start + d.dilation - 1) / d.dilation : 0;
  last = last < d.kernel ? last : d.kernel;
  return {first, last > first ? last : first};
}

// Outputs whose windows span input i; with a dilation some of them pass over it.
template <class D, class I>
PYDL_POOL_FUNCTION Span<I> covering(const D& d, I i) {
  if (d.adaptive) return outputs_of(d, i);
  const I reach = i + d.padding - (d.kernel - 1) * d.dilation, last = (i + d.padding) / d.stride + 1;
  return {reach > 0 ? (reach + d.stride - 1) / d.stride : 0, last < d.out ? last : d.out};
}
// The tap by which output o reads input i of those that it spans, -1 if it passes over it.
template <class D, class I>
PYDL_POOL_FUNCTION I tap_at(const D& d, I o, I i) {
  const I distance = i - window_start(d, o);
  return d.dilation == 1 ? distance : distance % d.dilation == 0 ? distance / d.dilation : -1;
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

inline constexpr int64_t kPoolLimit = int64_t(1) << 31;  // keeps every product below 2^63

// Taps of a window, as many as an int64 can count.
inline int64_t taps_of(const PoolShape& s) {
  int64_t taps = s.h.kernel * s.w.kernel;
  return __builtin_mul_overflow(taps, s.d.kernel, &taps) ? INT64_MAX : taps;
}
// A tap's number fits into the 8 bits of an offset.
inline bool offsets_fit(const PoolShape& s) { return taps_of(s) <= 255; }

// Taps of a window that can lie inside the input: the work behind an output.
inline int64_t inner_window(const PoolShape& s) {
  const auto inside = [](const PoolDim& d) { return double(std::min(d.kernel, d.in)); };
  return int64_t(std::min(inside(s.d) * inside(s.h) * inside(s.w), 1e15));
}

// The dimensions of a pooling, those that the tensor has, in its order.
inline PoolDim& axis_of(PoolShape& s, int64_t i) {
  const int64_t from_last = s.dims - 1 - i;
  return from_last == 0 ? s.w : from_last == 1 ? s.h : s.d;
}
inline const PoolDim& axis_of(const PoolShape& s, int64_t i) { return axis_of(const_cast<PoolShape&>(s), i); }

inline PoolDim adaptive_dim(int64_t in, int64_t out) {
  if (out > 0 && in % out == 0) return {in, out, in / out, in / out, 0, 1};
  return {in, out, out > 0 ? std::min(in / out + 2, in) : 1, 1, 0, 1, true};
}

// One dimension of a pooling with this kernel_size, stride, padding and dilation.
inline PoolDim strided_dim(const char* op, int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                           int64_t dilation) {
  STD_TORCH_CHECK(kernel >= 1 && kernel < kPoolLimit, op, ": kernel_size must be in [1, 2^31), got ", kernel);
  STD_TORCH_CHECK(stride >= 1 && stride < kPoolLimit, op, ": stride must be in [1, 2^31), got ", stride);
  STD_TORCH_CHECK(dilation >= 1 && dilation < kPoolLimit, op, ": dilation must be in [1, 2^31), got ", dilation);
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

// Whether a list of `parts` entries for each dimension, or of the output sizes of adaptive windows; one list, because
// each list argument costs a microsecond on its way through the dispatcher.
inline bool is_adaptive(const char* op, const Sizes& window, int64_t dims, int64_t parts) {
  const int64_t size = int64_t(window.size());
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, op, ": the tensor must have 3 to 5 dimensions, got ", dims + 2);
  STD_TORCH_CHECK(size == dims || size == parts * dims, op, ": window must have ", dims, " or ", parts * dims,
                  " entries, got ", size);
  return size == dims;
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

inline PoolShape plain_shape(const Array& x) {
  return {x.sizes[0], x.sizes[1], kNoDim, kNoDim, kNoDim, like_channels_last(x), x.dim - 2};
}

// Dimension i of a max pooling; `window` is kernel_size, stride, padding and dilation, as many of each as dimensions.
inline PoolDim max_dim(const char* op, int64_t in, const Sizes& window, int64_t i) {
  const size_t dims = window.size() / 4, at = size_t(i);
  return strided_dim(op, in, window[at], window[dims + at], window[2 * dims + at], window[3 * dims + at]);
}

// Shape of the max pooling of x; for adaptive windows `window` holds the output's sizes.
inline PoolShape forward_shape(const char* op, const Tensor& x, const Sizes& window, bool ceil_mode) {
  const Array meta(x);
  const bool adaptive = is_adaptive(op, window, meta.dim - 2, 4);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  PoolShape s = plain_shape(meta);
  for (int64_t i = 0; i < s.dims; ++i) {
    const int64_t in = meta.sizes[2 + i];
    PoolDim& d = axis_of(s, i);
    if (adaptive) {
      const int64_t out = window[size_t(i)];
      STD_TORCH_CHECK(in >= 1 && in < kPoolLimit && out >= 0 && out < kPoolLimit, op,
                      ": sizes must be in [1, 2^31) before and in [0, 2^31) after pooling, got ", in, " and ", out);
      d = adaptive_dim(in, out);
      continue;
    }
    d = max_dim(op, in, window, i);
    d.out = pooled_size(d, ceil_mode);
    STD_TORCH_CHECK(d.in > 0 && d.out > 0, op, ": x of size ", d.in, " is too small for kernel_size ", d.kernel,
                    ": the output would be ", d.out);
  }
  return s;
}

// Shape of the max pooling of an input of this size that gave `indices`.
inline PoolShape index_shape(const char* op, const Tensor& tensor, const int64_t* size, int64_t dims,
                             const Sizes& window) {
  const Array indices(tensor);
  const bool adaptive = is_adaptive(op, window, indices.dim - 2, 4);
  STD_TORCH_CHECK(indices.dtype == Dtype::kUInt8 || indices.dtype == Dtype::kInt64, op,
                  ": indices must be uint8 or int64");
  PoolShape s = plain_shape(indices);
  STD_TORCH_CHECK(dims == s.dims, op, ": indices must have ", dims + 2, " dimensions, got ", indices.dim);
  int64_t pixels = 1;
  for (int64_t i = 0; i < dims; ++i) {
    STD_TORCH_CHECK(size[i] > 0 && size[i] <= INT64_MAX / pixels, op, ": sizes must be positive, got ", size[i]);
    pixels *= size[i];
    PoolDim& d = axis_of(s, i);
    const int64_t out = indices.sizes[2 + i];
    if (adaptive) {
      STD_TORCH_CHECK(size[i] < kPoolLimit && out < kPoolLimit, op, ": sizes must be below 2^31, got ", size[i]);
      d = adaptive_dim(size[i], out);
    } else {
      d = max_dim(op, size[i], window, i);
      d.out = out;
      STD_TORCH_CHECK(out < INT64_MAX / 2 / d.stride, op, ": indices are too large, got size ", out);
    }
  }
  return s;
}

// Shape of an unpooling: `indices` are its smaller side, `size` the larger one's, `x` a tensor of either side.
inline PoolShape unpool_shape(const char* op, const Tensor& x, const Tensor& indices, const int64_t* size,
                              int64_t dims) {
  const Array meta(x), index(indices);
  STD_TORCH_CHECK(dims >= 1 && dims <= 3 && meta.dim == dims + 2 && index.dim == dims + 2, op,
                  ": the tensors must have 3 to 5 dimensions, two more than size, got ", meta.dim, " and ", index.dim);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": values must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(index.dtype == Dtype::kInt64, op, ": indices must be int64");
  PoolShape s = plain_shape(meta);
  STD_TORCH_CHECK(index.sizes[0] == s.batch && index.sizes[1] == s.channels, op, ": indices must have ", s.batch, " x ",
                  s.channels, " planes, got ", index.sizes[0], " x ", index.sizes[1]);
  const bool smaller = meta.sizes + 2 != size;  // else the sizes are its own
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t out = index.sizes[2 + i];
    STD_TORCH_CHECK(size[i] > 0 && size[i] < kPoolLimit && out < kPoolLimit, op, ": sizes must be in [1, 2^31), got ",
                    size[i]);
    STD_TORCH_CHECK(!smaller || meta.sizes[2 + i] == out, op, ": indices must have the shape of x");
    axis_of(s, i) = {size[i], out, 1, 1, 0, 1};
  }
  return s;
}

// The geometry of a mean over the windows of a tensor, its input or (backward) its output. `window` holds the other
// side's sizes, then kernel_size, stride and padding unless the windows are adaptive.
inline PoolShape mean_shape(const char* op, const Tensor& tensor, const Sizes& window, bool forward) {
  const Array given(tensor);
  const bool adaptive = is_adaptive(op, window, given.dim - 2, 4);
  STD_TORCH_CHECK(host::is_floating(given.dtype), op, ": the tensor must be float32, float64, float16 or bfloat16");
  PoolShape s = plain_shape(given);
  for (int64_t i = 0; i < s.dims; ++i) {
    const int64_t own = given.sizes[2 + i], other = window[size_t(i)], in = forward ? own : other;
    const int64_t out = forward ? other : own;
    STD_TORCH_CHECK(in >= 1 && in < kPoolLimit && out >= 0 && out < kPoolLimit, op,
                    ": sizes must be in [1, 2^31) before and in [0, 2^31) after pooling, got ", in, " and ", out);
    PoolDim& d = axis_of(s, i);
    if (adaptive) {
      d = adaptive_dim(in, out);
      continue;
    }
    const auto entry = [&](int64_t part) { return window[size_t(part * s.dims + i)]; };
    d = strided_dim(op, in, entry(1), entry(2), entry(3), 1);
    d.out = out;
    STD_TORCH_CHECK(out >= 1 && (out - 1) * d.stride < in + d.padding, op, ": ", out,
                    " windows reach past an input of size ", in);
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
  for (int64_t i = 0; i < s.dims; ++i) layout.sizes[2 + i] = outputs ? axis_of(s, i).out : axis_of(s, i).in;
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
