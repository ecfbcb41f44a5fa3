// Max pooling, forward: the channels-last layout, vectorised over channels, and a plain loop for shapes that the other
// kernels' buffers and tap numbers do not fit.

#include "cpu/max_pool_window.h"

namespace pydl::PYDL_ISA {
namespace {

// U vectors of channels of one output pixel; x points at the window's first tap inside the input.
template <int U, bool INDEX, class T, class C, class Extent>
inline void pool_channels(const PoolFwd& a, const T* x, Taps rows, Taps cols, int64_t position, int64_t window,
                          Extent extent) {
  const PoolShape& s = a.shape;
  Best<C, INDEX, true> best[U];
  for (int u = 0; u < U; ++u) best[u] = {splat(-kInfinity<C>), splat_int<C>(rows.first * s.w.kernel + cols.first)};
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const T* tap = x + (i - rows.first) * s.h.dilation * s.w.in * s.channels;
    for (int64_t j = cols.first; j < cols.last; ++j, tap += s.w.dilation * s.channels) {
      const IntVec<C> number = splat_int<C>(i * s.w.kernel + j);
      for (int u = 0; u < U; ++u) best[u].take(load(tap + u * kLanes<C>, extent), number);
    }
  }
  for (int u = 0; u < U; ++u) {
    store(static_cast<T*>(a.y) + position + u * kLanes<C>, best[u].value, extent);
    if constexpr (INDEX) store_indices<C>(a, position + u * kLanes<C>, window, 0, best[u].tap, extent);
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
    const int64_t n = item / s.h.out, oh = item % s.h.out;
    const Taps rows = inner_taps(s.h, oh);
    const int64_t top = oh * s.h.stride - s.h.padding;
    for (int64_t ow = 0; ow < s.w.out; ++ow) {
      const Taps cols = inner_taps(s.w, ow);
      const int64_t left = ow * s.w.stride - s.w.padding, position = (item * s.w.out + ow) * s.channels;
      const int64_t ih = top + rows.first * s.h.dilation, iw = left + cols.first * s.w.dilation;
      const bool empty = rows.first == rows.last || cols.first == cols.last;
      const T* x = static_cast<const T*>(a.x) + (empty ? 0 : ((n * s.h.in + ih) * s.w.in + iw) * s.channels);
      const int64_t window = top * s.w.in + left;
      int64_t c = 0;
      for (; c + kMany * L <= s.channels; c += kMany * L) {
        pool_channels<kMany, INDEX, T, C>(a, x + c, rows, cols, position + c, window, Whole{});
      }
      for (; c + 4 * L <= s.channels; c += 4 * L) {
        pool_channels<4, INDEX, T, C>(a, x + c, rows, cols, position + c, window, Whole{});
      }
      for (; c + L <= s.channels; c += L) {
        pool_channels<1, INDEX, T, C>(a, x + c, rows, cols, position + c, window, Whole{});
      }
      if (c < s.channels) {
        pool_channels<1, INDEX, T, C>(a, x + c, rows, cols, position + c, window, Part{s.channels - c});
      }
    }
  }
}

// ---- any layout and size, one output at a time

template <class T, class C>
void plain_outputs(const PoolFwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t step = s.channels_last ? s.channels : 1;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t channel = s.channels_last ? position % s.channels : position / (s.h.out * s.w.out) % s.channels;
    const int64_t pixel = s.channels_last ? position / s.channels : position;
    const int64_t ow = pixel % s.w.out, oh = pixel / s.w.out % s.h.out;
    const int64_t n = position / (s.channels * s.h.out * s.w.out);
    const T* x = static_cast<const T*>(a.x) + n * s.channels * s.h.in * s.w.in +
                 channel * (s.channels_last ? 1 : s.h.in * s.w.in);
    const Taps rows = inner_taps(s.h, oh), cols = inner_taps(s.w, ow);
    const int64_t top = oh * s.h.stride - s.h.padding, left = ow * s.w.stride - s.w.padding;
    C best = -kInfinity<C>;
    int64_t best_i = rows.first, best_j = cols.first;
    for (int64_t i = rows.first; i < rows.last; ++i) {
      for (int64_t j = cols.first; j < cols.last; ++j) {
        const C v = to_compute(x[((top + i * s.h.dilation) * s.w.in + left + j * s.w.dilation) * step]);
        if (v > best || v != v) {
          best = v;
          best_i = i;
          best_j = j;
        }
      }
    }
    from_compute(best, static_cast<T*>(a.y) + position);
    if (a.indices == nullptr) continue;
    if (a.flat) {
      static_cast<int64_t*>(a.indices)[position] =
          (top + best_i * s.h.dilation) * s.w.in + left + best_j * s.w.dilation;
    } else {
      static_cast<uint8_t*>(a.indices)[position] = uint8_t(best_i * s.w.kernel + best_j);
    }
  }
}

}  // namespace

// Rows [begin, end) of the batch * h.out output rows of the channels-last layout.
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
