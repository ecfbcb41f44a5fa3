// Max pooling, forward: the channels-last layout, vectorised over channels, windows over whole planes, and a plain loop
// for shapes that the other kernels' buffers and tap numbers do not fit.

#include "common/lanes.h"
#include "cpu/max_pool_window.h"

namespace pydl::PYDL_ISA {
namespace {

// The taps of one output pixel inside the input, and where the window's tap 0 lies in the plane.
struct WindowTaps {
  Span<int64_t> d, h, w;
  int64_t origin;

  bool empty() const { return d.first >= d.last || h.first >= h.last || w.first >= w.last; }
};
inline WindowTaps window_taps(const PoolShape& s, int64_t od, int64_t oh, int64_t ow) {
  const int64_t origin = (window_start(s.d, od) * s.h.in + window_start(s.h, oh)) * s.w.in + window_start(s.w, ow);
  return {inner_taps(s.d, od), inner_taps(s.h, oh), inner_taps(s.w, ow), origin};
}
inline int64_t tap_number(const PoolShape& s, int64_t i, int64_t j, int64_t k) {
  return (i * s.h.kernel + j) * s.w.kernel + k;
}
// Distance of a tap from tap 0 in the plane.
inline int64_t tap_distance(const PoolShape& s, int64_t i, int64_t j, int64_t k) {
  return (i * s.d.dilation * s.h.in + j * s.h.dilation) * s.w.in + k * s.w.dilation;
}

// U vectors of channels of one output pixel; x points at its image's first channel of the vectors.
template <int U, bool INDEX, class T, class C, class Extent>
inline void pool_channels(const PoolFwd& a, const T* x, const WindowTaps& t, int64_t position, Extent extent) {
  const PoolShape& s = a.shape;
  Best<C, INDEX, true> best[U];
  const IntVec<C> first = splat_int<C>(tap_number(s, t.d.first, t.h.first, t.w.first));
  for (int u = 0; u < U; ++u) best[u] = {splat(-kInfinity<C>), first};
  for (int64_t i = t.d.first; i < t.d.last; ++i) {
    for (int64_t j = t.h.first; j < t.h.last; ++j) {
      const T* tap = x + (t.origin + tap_distance(s, i, j, t.w.first)) * s.channels;
      for (int64_t k = t.w.first; k < t.w.last; ++k, tap += s.w.dilation * s.channels) {
        const IntVec<C> number = splat_int<C>(tap_number(s, i, j, k));
        for (int u = 0; u < U; ++u) best[u].take(load(tap + u * kLanes<C>, extent), number);
      }
    }
  }
  for (int u = 0; u < U; ++u) {
    store(static_cast<T*>(a.y) + position + u * kLanes<C>, best[u].value, extent);
    if constexpr (INDEX) store_indices<C>(a, position + u * kLanes<C>, t.origin, 0, best[u].tap, extent);
  }
}

// Vectors at once, as the registers allow: reading a pixel's channels in one go is what the prefetcher likes.
inline constexpr int kMany = PYDL_VEC_BYTES == 64 ? 16 : 8;

// Items are output rows of images.
template <bool INDEX, class T, class C>
void channels_last_rows(const PoolFwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  constexpr int L = kLanes<C>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t oh = item % s.h.out, od = item / s.h.out % s.d.out, n = item / (s.h.out * s.d.out);
    const T* x = static_cast<const T*>(a.x) + n * s.d.in * s.h.in * s.w.in * s.channels;
    for (int64_t ow = 0; ow < s.w.out; ++ow) {
      WindowTaps t = window_taps(s, od, oh, ow);
      if (t.empty()) t.d.last = t.d.first;
      const int64_t position = (item * s.w.out + ow) * s.channels;
      int64_t c = 0;
      for (; c + kMany * L <= s.channels; c += kMany * L) {
        pool_channels<kMany, INDEX, T, C>(a, x + c, t, position + c, Whole{});
      }
      for (; c + 4 * L <= s.channels; c += 4 * L) pool_channels<4, INDEX, T, C>(a, x + c, t, position + c, Whole{});
      for (; c + L <= s.channels; c += L) pool_channels<1, INDEX, T, C>(a, x + c, t, position + c, Whole{});
      if (c < s.channels) pool_channels<1, INDEX, T, C>(a, x + c, t, position + c, Part{s.channels - c});
    }
  }
}

// ---- any layout and size, one output at a time

template <class T, class C>
void plain_outputs(const PoolFwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t step = s.channels_last ? s.channels : 1, pixels = s.d.out * s.h.out * s.w.out;
  const int64_t inputs = s.d.in * s.h.in * s.w.in;
  int64_t row_before = -1;
  WindowTaps t{};
  for (int64_t position = begin; position < end; ++position) {
    const int64_t pixel = s.channels_last ? position / s.channels : position, row = pixel / s.w.out;
    const int64_t ow = pixel - row * s.w.out;
    if (row != row_before) {  // divisions cost more than a small window
      t = window_taps(s, row / s.h.out % s.d.out, row % s.h.out, 0);
      t.origin -= window_start(s.w, int64_t(0));
      row_before = row;
    }
    t.w = inner_taps(s.w, ow);
    const int64_t origin = t.origin + window_start(s.w, ow);
    const T* x = static_cast<const T*>(a.x);
    if (s.channels_last) {
      x += pixel / pixels * s.channels * inputs + position % s.channels;
    } else {
      x += row / (s.d.out * s.h.out) * inputs;
    }
    C best = -kInfinity<C>;
    int64_t tap = tap_number(s, t.d.first, t.h.first, t.w.first);
    int64_t place = origin + tap_distance(s, t.d.first, t.h.first, t.w.first);
    for (int64_t i = t.d.first; i < t.d.last; ++i) {
      for (int64_t j = t.h.first; j < t.h.last; ++j) {
        int64_t at = origin + tap_distance(s, i, j, t.w.first), number = tap_number(s, i, j, t.w.first);
        for (int64_t k = t.w.first; k < t.w.last; ++k, at += s.w.dilation, ++number) {
          const C v = to_compute(x[at * step]);
          if (v > best || v != v) {
            best = v;
            tap = number;
            place = at;
          }
        }
      }
    }
    from_compute(best, static_cast<T*>(a.y) + position);
    if (a.indices == nullptr) continue;
    if (a.flat) {
      static_cast<int64_t*>(a.indices)[position] = place;
    } else {
      static_cast<uint8_t*>(a.indices)[position] = uint8_t(tap);
    }
  }
}

// ---- contiguous layout, windows over whole planes of n elements

// The largest element, or the last NaN.
template <class T, class C>
int64_t largest_of(const T* x, int64_t n, bool find, C* value) {
  Vec<C> best[4];
  for (Vec<C>& b : best) b = splat(-kInfinity<C>);
  Mask<C> nan = {};
  sweep<C>(n, [&](int64_t i, int slot, auto extent) {
    const Vec<C> v = load(x + i, extent, splat(-kInfinity<C>));
    nan |= is_nan(v);
    best[slot] = max_number(v, best[slot]);
  });
  if (any<C>(nan)) {
    int64_t at = n - 1;
    while (to_compute(x[at]) == to_compute(x[at])) --at;
    *value = to_compute(x[at]);
    return at;
  }
  const Vec<C> lanes = max_number(max_number(best[0], best[1]), max_number(best[2], best[3]));
  C most = lanes[0];
  for (int i = 1; i < kLanes<C>; ++i) most = lanes[i] > most ? lanes[i] : most;
  *value = most;
  if (!find || most == -kInfinity<C>) return 0;
  constexpr uint32_t kAll = uint32_t((uint64_t(1) << kLanes<C>)-1);
  for (int64_t i = 0;; i += kLanes<C>) {
    const Vec<C> fill = splat(-kInfinity<C>);
    const Vec<C> v = i + kLanes<C> <= n ? load(x + i) : load(x + i, Part{n - i}, fill);
    const uint32_t reached = kAll & ~lane_bits<C>(greater(splat(most), v));
    if (reached != 0) {
      *value = to_compute(x[i + __builtin_ctz(reached)]);
      return i + __builtin_ctz(reached);
    }
  }
}

template <class T, class C>
void whole_planes(const PoolFwd& a, int64_t begin, int64_t end) {
  const int64_t n = a.shape.d.in * a.shape.h.in * a.shape.w.in;
  for (int64_t plane = begin; plane < end; ++plane) {
    C value;
    const int64_t at = largest_of<T, C>(static_cast<const T*>(a.x) + plane * n, n, a.indices != nullptr, &value);
    from_compute(value, static_cast<T*>(a.y) + plane);
    if (a.indices == nullptr) continue;
    if (a.flat) {
      static_cast<int64_t*>(a.indices)[plane] = at;
    } else {
      static_cast<uint8_t*>(a.indices)[plane] = uint8_t(at);
    }
  }
}

}  // namespace

// Planes [begin, end) of the contiguous layout, each of them one window.
void max_pool_planes(const PoolFwd& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, whole_planes<T, compute_t<T>>(a, begin, end));
}

// Rows [begin, end) of the batch * d.out * h.out output rows of the channels-last layout.
void max_pool_rows(const PoolFwd& a, int64_t begin, int64_t end) {
  if (a.indices == nullptr) {
    PYDL_FLOAT_SWITCH(a.dtype, channels_last_rows<false, T, compute_t<T>>(a, begin, end));
  } else {
    PYDL_FLOAT_SWITCH(a.dtype, channels_last_rows<true, T, compute_t<T>>(a, begin, end));
  }
}

// Outputs [begin, end) in memory order, either layout.
void max_pool_outputs(const PoolFwd& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, plain_outputs<T, compute_t<T>>(a, begin, end));
}

}  // namespace pydl::PYDL_ISA
