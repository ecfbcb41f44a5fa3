// Mean pooling, channels-last layout: every written pixel gathers from the pixels it depends on, vectorised over
// channels, forward and backward by one loop nest. The taps of a row are added up before the rows are.

#include "cpu/avg_pool.h"

namespace pydl::PYDL_ISA {
namespace {

// One dimension's part in a written pixel: what is read, and by which factors.
template <class C>
struct Reach {
  Span<int64_t> span;
  const C* weights;  // backward: 1 / share of the positions that are read
};

// U vectors of channels of one written pixel; `from` and `to` point at its image's first channel of the vectors.
template <bool FORWARD, int U, class T, class C, class Extent>
inline void mean_channels(const PoolShape& s, const T* from, T* to, const Reach<C>& d, const Reach<C>& h,
                          const Reach<C>& w, C divisor, Extent extent) {
  const int64_t width = read<FORWARD>(s.w), height = read<FORWARD>(s.h);
  Vec<C> sums[U] = {};
  for (int64_t i = d.span.first; i < d.span.last; ++i) {
    for (int64_t j = h.span.first; j < h.span.last; ++j) {
      const T* pixel = from + ((i * height + j) * width + w.span.first) * s.channels;
      Vec<C> row[U] = {};
      for (int64_t k = w.span.first; k < w.span.last; ++k, pixel += s.channels) {
        if constexpr (FORWARD) {
          for (int u = 0; u < U; ++u) row[u] += load(pixel + u * kLanes<C>, extent);
        } else {
          const Vec<C> weight = splat(w.weights[k]);
          for (int u = 0; u < U; ++u) row[u] += load(pixel + u * kLanes<C>, extent) * weight;
        }
      }
      if constexpr (FORWARD) {
        for (int u = 0; u < U; ++u) sums[u] += row[u];
      } else {
        const Vec<C> weight = splat(d.weights[i] * h.weights[j]);
        for (int u = 0; u < U; ++u) sums[u] += row[u] * weight;
      }
    }
  }
  for (int u = 0; u < U; ++u) {
    store(to + u * kLanes<C>, FORWARD ? sums[u] / splat(divisor) : sums[u], extent);
  }
}

// Vectors at once: a row's sums and the pixel's fill the registers.
inline constexpr int kMany = PYDL_VEC_BYTES == 64 ? 8 : 4;

// Items are written rows of images, each in blocks of channels; `scratch` holds the weights of all three dimensions.
template <bool FORWARD, class T, class C>
void channels_last_rows(const PoolMean& a, C* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  constexpr int L = kLanes<C>;
  C *depths = scratch, *heights = depths + s.d.out, *widths = heights + s.h.out;
  if constexpr (!FORWARD) {
    for (int64_t o = 0; o < s.d.out; ++o) depths[o] = 1 / depth_share<C>(a, o);
    for (int64_t o = 0; o < s.h.out; ++o) heights[o] = 1 / share<C>(a, s.h, o);
    for (int64_t o = 0; o < s.w.out; ++o) widths[o] = 1 / share<C>(a, s.w, o);
  }
  const int64_t blocks = ceil_div(s.channels, a.channel_block),
                inputs = read<FORWARD>(s.d) * read<FORWARD>(s.h) * read<FORWARD>(s.w) * s.channels;
  const int64_t depth = written<FORWARD>(s.d), height = written<FORWARD>(s.h), width = written<FORWARD>(s.w);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, first = item % blocks * a.channel_block;
    const int64_t last = smaller(first + a.channel_block, s.channels);
    const int64_t i = row / height % depth, j = row % height;
    const T* from = static_cast<const T*>(a.from) + row / (height * depth) * inputs;
    const Reach<C> d{sources<FORWARD>(s.d, i), depths}, h{sources<FORWARD>(s.h, j), heights};
    C share_of_row = 1;
    if constexpr (FORWARD) share_of_row = depth_share<C>(a, i) * share<C>(a, s.h, j);
    for (int64_t k = 0; k < width; ++k) {
      const Reach<C> w{sources<FORWARD>(s.w, k), widths};
      C divisor = 1;
      if constexpr (FORWARD) divisor = share_of_row * share<C>(a, s.w, k);
      T* to = static_cast<T*>(a.to) + (row * width + k) * s.channels;
      int64_t c = first;
      for (; c + kMany * L <= last; c += kMany * L) {
        mean_channels<FORWARD, kMany, T, C>(s, from + c, to + c, d, h, w, divisor, Whole{});
      }
      for (; c + L <= last; c += L) {
        mean_channels<FORWARD, 1, T, C>(s, from + c, to + c, d, h, w, divisor, Whole{});
      }
      if (c < last) mean_channels<FORWARD, 1, T, C>(s, from + c, to + c, d, h, w, divisor, Part{last - c});
    }
  }
}

}  // namespace

// Items [begin, end) of the channels-last layout; `scratch` has room for d.out + h.out + w.out values.
void avg_pool_rows(const PoolMean& a, bool forward, void* scratch, int64_t begin, int64_t end) {
  if (forward) {
    PYDL_FLOAT_SWITCH(a.dtype,
                      channels_last_rows<true, T, compute_t<T>>(a, static_cast<compute_t<T>*>(scratch), begin, end));
  } else {
    PYDL_FLOAT_SWITCH(a.dtype,
                      channels_last_rows<false, T, compute_t<T>>(a, static_cast<compute_t<T>*>(scratch), begin, end));
  }
}

}  // namespace pydl::PYDL_ISA
