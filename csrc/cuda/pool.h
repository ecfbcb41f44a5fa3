// What the kernels of pooling share: geometry on the device, host-side shapes and grids.
#pragma once

#include "common/cuda_host.h"
#include "common/device_vec.h"
#include "common/indexing.h"
#include "common/pool.h"

namespace pydl {
namespace {

using cuda_host::DeviceGuard;

constexpr int kPoolThreads = 256;
constexpr int kVectorBytes = 16;

// One spatial dimension in 32 bits: make_axis() checks that no coordinate leaves them. Output o reads inputs
// o * stride - padding + tap * dilation.
struct Axis {
  int in, out, kernel, stride, padding, dilation;
  bool adaptive;
};

// A pair of tensors, plane- or channel-minor: `channels_last` says which. Element offsets are 64-bit throughout.
struct Pool {
  int64_t batch;
  int channels;
  Axis d, h, w;
  bool channels_last;
};

// One side of the pooling: how many elements each dimension has.
struct Extents {
  int d, h, w;

  __host__ __device__ int64_t pixels() const { return int64_t(d) * h * w; }
};
__host__ __device__ inline Extents inputs_of(const Pool& p) { return {p.d.in, p.h.in, p.w.in}; }
__host__ __device__ inline Extents outputs_of(const Pool& p) { return {p.d.out, p.h.out, p.w.out}; }

// Coordinates of element number `item` of one side.
struct Place {
  int64_t n;
  int c, d, h, w;
};
__device__ inline Place place_of(const Pool& p, uint64_t item, const Extents& side) {
  Place at;
  if (p.channels_last) at.c = take_digit(item, p.channels);
  at.w = take_digit(item, side.w);
  at.h = take_digit(item, side.h);
  at.d = take_digit(item, side.d);
  if (!p.channels_last) at.c = take_digit(item, p.channels);
  at.n = int64_t(item);
  return at;
}

// Where element (d, h, w) lies in its plane of one side.
__device__ inline int64_t pixel_of(const Extents& side, int d, int h, int w) {
  return (int64_t(d) * side.h + h) * side.w + w;
}
// Offset of pixel `pixel` of the plane of an image and channel.
__device__ inline int64_t offset_of(const Pool& p, int64_t n, int c, int64_t pixels, int64_t pixel) {
  return p.channels_last ? (n * pixels + pixel) * p.channels + c : (n * p.channels + c) * pixels + pixel;
}
// Number of a tap in its window.
__device__ inline int tap_number(const Pool& p, int i, int j, int k) { return (i * p.h.kernel + j) * p.w.kernel + k; }

inline Axis make_axis(const char* op, const PoolDim& d) {
  STD_TORCH_CHECK(d.out < int64_t(1) << 31, op, ": sizes must stay below 2^31 along each axis, got ", d.out);
  int64_t largest = std::max(d.in, d.out * d.stride) + 2 * d.padding + d.stride + d.dilation * d.kernel;
  STD_TORCH_CHECK(largest < int64_t(1) << 31, op, ": sizes must stay below 2^31 along each axis, got ", largest);
  return {int(d.in), int(d.out), int(d.kernel), int(d.stride), int(d.padding), int(d.dilation), d.adaptive};
}

inline Pool make_pool(const char* op, const PoolShape& s) {
  STD_TORCH_CHECK(s.channels < int64_t(1) << 31, op, ": channels must be below 2^31, got ", s.channels);
  const int64_t limit = int64_t(1) << 31, plane = s.h.kernel * s.w.kernel;
  STD_TORCH_CHECK(plane < limit && plane * s.d.kernel < limit, op, ": a window must have fewer than 2^31 taps, got ",
                  s.d.kernel, " x ", s.h.kernel, " x ", s.w.kernel);
  return {s.batch, int(s.channels), make_axis(op, s.d), make_axis(op, s.h), make_axis(op, s.w), s.channels_last};
}

inline unsigned pool_grid(const char* op, int64_t items) {
  int64_t blocks = ceil_div(items, int64_t(kPoolThreads));
  STD_TORCH_CHECK(blocks <= kMaxGridX, op, ": too many elements, ", items);
  return unsigned(blocks);
}

// A tensor of one side of the pooling, in the layout of `s`.
inline Output empty_planes(const DeviceGuard& guard, const PoolShape& s, bool outputs, Dtype dtype) {
  const PoolLayout layout = pool_layout(s, outputs);
  return guard.empty_strided(layout.sizes, layout.strides, layout.dim, dtype);
}

// Planes, not volumes.
inline bool flat_depth(const Pool& p) { return p.d.in == 1 && p.d.kernel == 1; }

// Kernels of 3 x 3 and 2 x 2 windows without dilation whose loops are unrolled.
template <int K_, int S_, int P_>
struct Window {
  static constexpr int K = K_;
  static constexpr int S = S_;
  static constexpr int P = P_;
};

inline bool square(const Pool& p, int kernel, int stride, int padding) {
  auto matches = [&](const Axis& a) {
    return !a.adaptive && a.kernel == kernel && a.stride == stride && a.padding == padding && a.dilation == 1;
  };
  return flat_depth(p) && matches(p.h) && matches(p.w);
}

// Calls f(Window<...>{}) for the unrolled window of this geometry; false if there is none.
template <typename F>
bool with_window(const Pool& p, F f) {
  if (square(p, 3, 2, 1)) return f(Window<3, 2, 1>{}), true;
  if (square(p, 3, 2, 0)) return f(Window<3, 2, 0>{}), true;
  if (square(p, 2, 2, 0)) return f(Window<2, 2, 0>{}), true;
  if (square(p, 3, 1, 1)) return f(Window<3, 1, 1>{}), true;
  return false;
}

}  // namespace
}  // namespace pydl
