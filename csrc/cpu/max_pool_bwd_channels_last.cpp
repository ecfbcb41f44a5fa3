// Max pooling, backward in the channels-last layout: every input pixel gathers from the windows that cover it, in
// order, vectorised over channels.

#include "common/pool.h"
#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

template <class C, class Extent>
inline Mask<C> points_to(const uint8_t* index, int64_t tap, Extent extent) {
  return equal(load_bytes<C>(index, extent), splat(int_t<C>(tap)));
}
template <class C, class Extent>
inline Mask<C> points_to(const int64_t* index, int64_t position, Extent extent) {
  return equal_int64<C>(index, position, extent);
}

// The windows that span one input pixel, and where it lies in the plane.
struct Pixel {
  int64_t n, id, ih, iw, place;
  Span<int64_t> depths, rows, cols;
};

// covering(d, i) from that of the input before it, without a division.
inline void advance(const PoolDim& d, int64_t i, Span<int64_t>& span) {
  if (d.adaptive) {
    span = covering(d, i);
    return;
  }
  const int64_t reach = i + d.padding;
  while (span.last < d.out && span.last * d.stride <= reach) ++span.last;
  while (span.first < span.last && span.first * d.stride + (d.kernel - 1) * d.dilation < reach) ++span.first;
}

// U vectors of channels of one input pixel.
template <int U, class I, class T, class C, class Extent>
inline void gather_channels(const PoolBwd& a, const Pixel& p, int64_t c, Extent extent) {
  const PoolShape& s = a.shape;
  Vec<C> sums[U] = {};
  for (int64_t od = p.depths.first; od < p.depths.last; ++od) {
    const int64_t i = tap_at(s.d, od, p.id);
    if (i < 0) continue;
    for (int64_t oh = p.rows.first; oh < p.rows.last; ++oh) {
      const int64_t j = tap_at(s.h, oh, p.ih);
      if (j < 0) continue;
      for (int64_t ow = p.cols.first; ow < p.cols.last; ++ow) {
        const int64_t k = tap_at(s.w, ow, p.iw);
        if (k < 0) continue;
        const int64_t from = (((p.n * s.d.out + od) * s.h.out + oh) * s.w.out + ow) * s.channels + c;
        const int64_t wanted = sizeof(I) == 1 ? (i * s.h.kernel + j) * s.w.kernel + k : p.place;
        for (int u = 0; u < U; ++u) {
          const int64_t at = from + u * kLanes<C>;
          const Mask<C> mask = points_to<C>(static_cast<const I*>(a.indices) + at, wanted, extent);
          sums[u] += select<C>(mask, load(static_cast<const T*>(a.dy) + at, extent), Vec<C>{});
        }
      }
    }
  }
  T* dx = static_cast<T*>(a.dx) + (p.n * s.d.in * s.h.in * s.w.in + p.place) * s.channels + c;
  for (int u = 0; u < U; ++u) store(dx + u * kLanes<C>, sums[u], extent);
}

// Items are input rows of images.
template <class I, class T, class C>
void gather_rows(const PoolBwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  constexpr int L = kLanes<C>;
  Pixel p;
  for (int64_t item = begin; item < end; ++item) {
    p.n = item / (s.h.in * s.d.in);
    p.id = item / s.h.in % s.d.in;
    p.ih = item % s.h.in;
    p.depths = covering(s.d, p.id);
    p.rows = covering(s.h, p.ih);
    p.cols = {0, 0};
    for (p.iw = 0; p.iw < s.w.in; ++p.iw) {
      advance(s.w, p.iw, p.cols);
      p.place = (p.id * s.h.in + p.ih) * s.w.in + p.iw;
      int64_t c = 0;
      for (; c + 16 * L <= s.channels; c += 16 * L) gather_channels<16, I, T, C>(a, p, c, Whole{});
      for (; c + 4 * L <= s.channels; c += 4 * L) gather_channels<4, I, T, C>(a, p, c, Whole{});
      for (; c + L <= s.channels; c += L) gather_channels<1, I, T, C>(a, p, c, Whole{});
      if (c < s.channels) gather_channels<1, I, T, C>(a, p, c, Part{s.channels - c});
    }
  }
}

}  // namespace

// Rows [begin, end) of the batch * d.in * h.in input rows of the channels-last layout.
void max_pool_gather_rows(const PoolBwd& a, int64_t begin, int64_t end) {
  if (a.flat) {
    PYDL_FLOAT_SWITCH(a.dtype, gather_rows<int64_t, T, compute_t<T>>(a, begin, end));
  } else {
    PYDL_FLOAT_SWITCH(a.dtype, gather_rows<uint8_t, T, compute_t<T>>(a, begin, end));
  }
}

}  // namespace pydl::PYDL_ISA
