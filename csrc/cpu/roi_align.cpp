// RoIAlign, forward (He et al., Mask R-CNN, 2017): each bin is the mean of bilinear samples, here a weighted sum of the
// pixels under them.
//
// Channels-last layout: vectorised over channels. Contiguous layout: the rows under a row of bins are first summed with
// their weights, vectorised over columns; then columns are spread over bins by a small matrix product, vectorised over
// bins. That multiplies pixels outside a bin by 0, so rows that hold an infinity or NaN are summed bin by bin instead.

#include "cpu/roi_spread.h"

namespace pydl::PYDL_ISA {
namespace {

// ---- channels-last layout

// U vectors of channels of one bin; x points at the channels of the image's first pixel.
template <int U, class T, class C, class Extent>
inline void pool_bin(const RoiShape& s, const T* x, RoiTaps<C> rows, RoiTaps<C> cols, T* y, Extent extent) {
  Vec<C> sums[U] = {};
  for (const RoiTap<C>& row : rows) {
    const T* pixels = x + row.pixel * s.width * s.channels;
    for (const RoiTap<C>& col : cols) {
      const Vec<C> weight = splat(row.weight * col.weight);
      for (int u = 0; u < U; ++u) {
        sums[u] += weight * load(pixels + col.pixel * s.channels + u * kLanes<C>, extent);
      }
    }
  }
  for (int u = 0; u < U; ++u) store(y + u * kLanes<C>, sums[u], extent);
}

// As many vectors at once as the registers hold.
inline constexpr int kMany = PYDL_VEC_BYTES == 64 ? 16 : 8;

// Items are rows of bins.
template <class T, class C>
void pool_rows(const RoiArgs& a, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  constexpr int L = kLanes<C>;
  for (int64_t item = begin; item < end; ++item) {
    const RoiPlan& plan = a.plans[item / s.out_h];
    const RoiTaps<C> rows = taps_of<C>(plan, item % s.out_h);
    const T* x = static_cast<const T*>(a.in) + plan.image * s.height * s.width * s.channels;
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      const RoiTaps<C> cols = taps_of<C>(plan, s.out_h + ow);
      T* y = static_cast<T*>(a.out) + (item * s.out_w + ow) * s.channels;
      int64_t c = 0;
      for (; c + kMany * L <= s.channels; c += kMany * L) pool_bin<kMany>(s, x + c, rows, cols, y + c, Whole{});
      for (; c + 4 * L <= s.channels; c += 4 * L) pool_bin<4>(s, x + c, rows, cols, y + c, Whole{});
      for (; c + L <= s.channels; c += L) pool_bin<1>(s, x + c, rows, cols, y + c, Whole{});
      if (c < s.channels) pool_bin<1>(s, x + c, rows, cols, y + c, Part{s.channels - c});
    }
  }
}

// ---- contiguous layout

// Sums the rows of x under a row of bins into `sums`, columns of the spread only; true if something is not finite.
template <class T, class C>
bool sum_rows(const RoiSpread<C>& spread, const T* x, int64_t width, RoiTaps<C> rows, C* sums) {
  Mask<C> odd = {};
  const auto sum = [&](int64_t i, auto extent) {
    Vec<C> total = {};
    for (const RoiTap<C>& row : rows) {
      total += splat(row.weight) * load(x + row.pixel * width + spread.left + i, extent);
    }
    odd |= is_nan(total - total);
    store(sums + i, total);
  };
  int64_t i = 0;
  for (; i + kLanes<C> <= spread.readable; i += kLanes<C>) sum(i, Whole{});
  if (i < spread.readable) sum(i, Part{spread.readable - i});
  return any<C>(odd);
}

// Asks for the rows of the next plane: they lie far from each other, so that no prefetcher would.
template <class T, class C>
void prefetch(const RoiSpread<C>& spread, RoiRange rows, const T* x, int64_t width) {
  for (int64_t row = rows.low; row < rows.high; ++row) {
    const T* from = x + row * width + spread.left;
    for (int64_t i = 0; i < spread.readable; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
    if (spread.readable > 0) __builtin_prefetch(from + spread.readable - 1);
  }
}

// Spreads R rows of sums over their bins. y ends at `end`: up to there, lanes too many may be written, as the rows
// that follow come later.
template <int R, class T, class C>
void spread_rows(const RoiShape& s, const RoiSpread<C>& spread, T* y, const T* end) {
  constexpr int L = kLanes<C>;
  for (int64_t j = 0; j < spread.lanes; j += L) {
    Vec<C> totals[R] = {};
    for (int64_t m = 0; m < spread.columns; ++m) {
      const int64_t column = spread.column[m];
      const Vec<C> weights = load(spread.weights + column * spread.lanes + j);
      for (int r = 0; r < R; ++r) totals[r] += splat(spread.sums[r * spread.width + column]) * weights;
    }
    for (int r = 0; r < R; ++r) {
      T* out = y + r * s.out_w + j;
      if (spread.lanes == L ? out + L <= end : j + L <= s.out_w) {
        store(out, totals[r]);
      } else {
        store(out, totals[r], Part{s.out_w - j});
      }
    }
  }
}

// The same bin by bin, for sums that are not all finite.
template <class T, class C>
void spread_rows_by_taps(const RoiShape& s, const RoiPlan& plan, const RoiSpread<C>& spread, int rows, T* y) {
  for (int r = 0; r < rows; ++r) {
    const C* sums = spread.sums + r * spread.width;
    for (int64_t ow = 0; ow < s.out_w; ++ow, ++y) {
      C total = 0;
      for (const RoiTap<C>& col : taps_of<C>(plan, s.out_h + ow)) total += col.weight * sums[col.pixel - spread.left];
      from_compute(total, y);
    }
  }
}

template <int R, class T, class C>
void spread_exactly(int rows, const RoiShape& s, const RoiSpread<C>& spread, T* y, const T* end) {
  if constexpr (R > 1) {
    if (rows < R) return spread_exactly<R - 1>(rows, s, spread, y, end);
  }
  spread_rows<R>(s, spread, y, end);
}

template <class T, class C>
void pool_plane(const RoiShape& s, const RoiPlan& plan, const RoiSpread<C>& spread, const T* x, T* y, const T* end) {
  for (int64_t oh = 0; oh < s.out_h; oh += kRoiRows) {
    const int rows = int(smaller(kRoiRows, s.out_h - oh));
    bool odd = false;
    for (int r = 0; r < rows; ++r) {
      odd |= sum_rows(spread, x, s.width, taps_of<C>(plan, oh + r), spread.sums + r * spread.width);
    }
    T* out = y + oh * s.out_w;
    odd ? spread_rows_by_taps(s, plan, spread, rows, out) : spread_exactly<kRoiRows>(rows, s, spread, out, end);
  }
}

// Items are boxes, by image, for each block of channels in turn: its planes stay in the cache.
template <class T, class C>
void pool_planes(const RoiArgs& a, void* scratch, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  const int64_t pixels = s.height * s.width, bins = s.out_h * s.out_w;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t k = a.order[item % s.rois], first = item / s.rois * a.block_channels;
    const int64_t last = smaller(first + a.block_channels, s.channels);
    const RoiPlan& plan = a.plans[k];
    RoiSpread<C> spread(a, plan, scratch);
    spread.by_column(s, plan);
    const T* x = static_cast<const T*>(a.in) + (plan.image * s.channels + first) * pixels;
    T* y = static_cast<T*>(a.out) + (k * s.channels + first) * bins;
    const T* stop = y + (last - first) * bins;
    for (int64_t c = first; c < last; ++c, x += pixels, y += bins) {
      if (c + 1 < last) prefetch(spread, plan.rows, x + pixels, s.width);
      pool_plane(s, plan, spread, x, y, stop);
    }
  }
}

}  // namespace

// Rows [begin, end) of the rois * out_h rows of bins, channels-last layout.
void roi_align_rows(const RoiArgs& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, pool_rows<T, compute_t<T>>(a, begin, end));
}

// Boxes [begin, end) of each block of a.block_channels channels in turn, contiguous layout.
void roi_align_planes(const RoiArgs& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, pool_planes<T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace pydl::PYDL_ISA

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, roi_align_rows, const RoiArgs&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, roi_align_planes, const RoiArgs&, void*, int64_t, int64_t)

namespace {

Tensor roi_align_fwd(const Tensor& x_in, const Tensor& boxes, int64_t out_h, int64_t out_w, double scale,
                     int64_t sampling, bool aligned) {
  const char* const op = "roi_align";
  const RoiShape s = roi_shape(op, Array(x_in), Array(boxes), out_h, out_w, scale, sampling, aligned);
  const Tensor x = dense_in(x_in, s.channels_last);
  const Array meta(x);
  Output y = empty_roi(roi_strides(s, s.rois, s.channels, s.out_h, s.out_w), meta.dtype);
  const RoiPlans plans(op, s, boxes, meta.dtype);
  if (s.rois * s.channels == 0) return std::move(y.tensor);
  RoiArgs a = plans.args(s, meta.dtype, meta.data, y.data);
  if (s.channels_last) {
    host::parallel(s.rois * s.out_h, s.out_w * s.channels * 8,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(roi_align_rows)(a, begin, end); });
  } else {
    a.block_channels = roi_block_channels(s, host::size_of(meta.dtype), 8);
    const int64_t blocks = (s.channels + a.block_channels - 1) / a.block_channels;
    host::parallel(s.rois * blocks, s.out_h * s.out_w * a.block_channels * 8, [&](int64_t begin, int64_t end) {
      const host::Scratch scratch(roi_spread_bytes(a));
      PYDL_CPU_DISPATCH(roi_align_planes)(a, scratch.get(), begin, end);
    });
  }
  return std::move(y.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("roi_align_fwd", TORCH_BOX(&roi_align_fwd)); }

}  // namespace
}  // namespace pydl

#endif
