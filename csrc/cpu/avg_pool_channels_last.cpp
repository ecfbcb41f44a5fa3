// Mean pooling, channels-last layout: every written pixel gathers from the pixels it depends on, vectorised over
// channels, forward and backward by one loop nest.

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
template <bool FORWARD, bool ROWS, int U, class T, class C, class Extent>
inline void mean_channels(const PoolShape& s, const T* from, T* to, const Reach<C>& d, const Reach<C>& h,
                          const Reach<C>& w, C share, Extent extent) {
  const int64_t width = read<FORWARD>(s.w), height = read<FORWARD>(s.h);
  Vec<C> sums[U] = {};
  for (int64_t i = d.span.first; i < d.span.last; ++i) {
    for (int64_t j = h.span.first; j < h.span.last; ++j) {
      const T* pixel = from + ((i * height + j) * width + w.span.first) * s.channels;
      const C row_share = FORWARD ? C(1) : d.weights[i] * h.weights[j];
      Vec<C> row[U] = {};
      Vec<C>* const parts = ROWS ? row : sums;
      for (int64_t k = w.span.first; k < w.span.last; ++k, pixel += s.channels) {
        if constexpr (FORWARD) {
          for (int u = 0; u < U; ++u) parts[u] += load(pixel + u * kLanes<C>, extent);
        } else {
          const Vec<C> weight = splat(row_share * w.weights[k]);
          for (int u = 0; u < U; ++u) parts[u] += load(pixel + u * kLanes<C>, extent) * weight;
        }
      }
      for (int u = 0; ROWS && u < U; ++u) sums[u] += row[u];
    }
  }
  for (int u = 0; u < U; ++u) store(to + u * kLanes<C>, FORWARD ? sums[u] * splat(share) : sums[u], extent);
}

// Items are written rows of images, each in blocks of channels; `scratch` holds the weights of all three dimensions.
// ROWS: a window's rows are added up first, for windows so large that a plain sum would lose digits.
template <bool FORWARD, bool ROWS, class T, class C>
void channels_last_rows(const PoolMean& a, C* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  constexpr int L = kLanes<C>;
  // vectors at once, as the registers allow: reading a pixel's channels in one go is what the prefetcher likes
  constexpr int kMany = (PYDL_VEC_BYTES == 64 ? 16 : 8) / (ROWS ? 2 : 1);
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
      C whole_share = 1;
      if constexpr (FORWARD) whole_share = 1 / (share_of_row * share<C>(a, s.w, k));
      T* to = static_cast<T*>(a.to) + (row * width + k) * s.channels;
      const auto channels = [&]<int U>(int64_t c, auto extent) {
        mean_channels<FORWARD, ROWS, U, T, C>(s, from + c, to + c, d, h, w, whole_share, extent);
      };
      int64_t c = first;
      for (; c + kMany * L <= last; c += kMany * L) channels.template operator()<kMany>(c, Whole{});
      for (; c + 4 * L <= last; c += 4 * L) channels.template operator()<4>(c, Whole{});
      for (; c + L <= last; c += L) channels.template operator()<1>(c, Whole{});
      if (c < last) channels.template operator()<1>(c, Part{last - c});
    }
  }
}

}  // namespace

// Items [begin, end) of the channels-last layout; `scratch` has room for d.out + h.out + w.out values.
void avg_pool_rows(const PoolMean& a, bool forward, void* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const auto most = [](const PoolDim& d) { return double(smaller(d.kernel, d.in)); };
  const bool many = most(s.d) * most(s.h) * most(s.w) > 128;
  if (!forward) {
    PYDL_FLOAT_SWITCH(
        a.dtype, channels_last_rows<false, false, T, compute_t<T>>(a, static_cast<compute_t<T>*>(scratch), begin, end));
  } else if (many) {
    PYDL_FLOAT_SWITCH(
        a.dtype, channels_last_rows<true, true, T, compute_t<T>>(a, static_cast<compute_t<T>*>(scratch), begin, end));
  } else {
    PYDL_FLOAT_SWITCH(
        a.dtype, channels_last_rows<true, false, T, compute_t<T>>(a, static_cast<compute_t<T>*>(scratch), begin, end));
  }
}

}  // namespace pydl::PYDL_ISA
