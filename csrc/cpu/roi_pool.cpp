// RoI max pooling (Girshick, Fast R-CNN, 2015), forward. The first maximum of a window in row-major order wins, NaN
// never does; a window that holds nothing above the lowest float32 has that value and no position, an empty one is 0.
//
// Channels-last layout: vectorised over channels. Contiguous layout: the rows of a row of bins are first reduced to
// one, vectorised over columns, which keeps the first row of each maximum; then each bin takes the best of its columns,
// the higher row where values are equal.

#include "cpu/roi_pool.h"

#include "cpu/max_pool_window.h"

namespace pydl::PYDL_ISA {
namespace {

inline constexpr int32_t kNoRow = 0x7fffffff;

inline void store_positions(int32_t* p, Vec<int32_t> v, Whole) { store_raw(p, v, Whole{}); }
inline void store_positions(int32_t* p, Vec<int32_t> v, Part part) { store_raw(p, v, part); }
template <class Extent>
inline void store_positions(int32_t* p, Vec<int64_t> v, Extent extent) {
  store_raw(p, __builtin_convertvector(v, VecN<int32_t, kLanes<double>>), extent);
}

// ---- channels-last layout

// U vectors of channels of one bin.
template <int U, bool INDEX, class T, class C, class Extent>
inline void pool_bin(const RoiShape& s, const T* x, RoiRange rows, RoiRange cols, C nothing, T* y, int32_t* argmax,
                     Extent extent) {
  Best<C, INDEX, false> best[U];
  for (int u = 0; u < U; ++u) best[u] = {splat(nothing), splat_int<C>(-1)};
  for (int64_t row = rows.low; row < rows.high; ++row) {
    for (int64_t col = cols.low; col < cols.high; ++col) {
      const int64_t position = row * s.width + col;
      for (int u = 0; u < U; ++u) {
        best[u].take(load(x + position * s.channels + u * kLanes<C>, extent), splat_int<C>(position));
      }
    }
  }
  for (int u = 0; u < U; ++u) {
    store(y + u * kLanes<C>, best[u].value, extent);
    if constexpr (INDEX) store_positions(argmax + u * kLanes<C>, best[u].tap, extent);
  }
}

// What a bin holds before its first pixel.
template <class C>
inline C before(const RoiWindows& box, RoiRange rows, RoiRange cols) {
  if (!box.finite) return C(__builtin_nan(""));
  return rows.low < rows.high && cols.low < cols.high ? C(kRoiLowest) : C(0);
}

// Items are rows of bins.
template <bool INDEX, class T, class C>
void pool_rows(const RoiPoolArgs& a, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  constexpr int L = kLanes<C>;
  for (int64_t item = begin; item < end; ++item) {
    const RoiWindows& box = a.boxes[item / s.out_h];
    const RoiRange rows = box.windows[item % s.out_h];
    const T* x = static_cast<const T*>(a.in) + box.image * s.height * s.width * s.channels;
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      const RoiRange cols = box.windows[s.out_h + ow];
      const int64_t at = (item * s.out_w + ow) * s.channels;
      const C nothing = before<C>(box, rows, cols);
      T* y = static_cast<T*>(a.out) + at;
      int32_t* argmax = a.argmax + at;
      int64_t c = 0;
      for (; c + 8 * L <= s.channels; c += 8 * L) {
        pool_bin<8, INDEX>(s, x + c, rows, cols, nothing, y + c, argmax + c, Whole{});
      }
      for (; c + L <= s.channels; c += L) {
        pool_bin<1, INDEX>(s, x + c, rows, cols, nothing, y + c, argmax + c, Whole{});
      }
      if (c < s.channels) {
        pool_bin<1, INDEX>(s, x + c, rows, cols, nothing, y + c, argmax + c, Part{s.channels - c});
      }
    }
  }
}

// ---- contiguous layout

// The largest value of each column of rows of x, and the first row that holds it.
template <bool INDEX, class T, class C>
void pool_columns(const T* x, int64_t width, RoiRange rows, int64_t left, int64_t count, C* values, int_t<C>* firsts) {
  const auto pool = [&](int64_t i, auto extent) {
    Best<C, INDEX, false> best{splat(C(kRoiLowest)), splat_int<C>(kNoRow)};
    for (int64_t row = rows.low; row < rows.high; ++row) {
      best.take(load(x + row * width + left + i, extent), splat_int<C>(row));
    }
    store(values + i, best.value);
    if constexpr (INDEX) store_raw(firsts + i, best.tap, Whole{});
  };
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) pool(i, Whole{});
  if (i < count) pool(i, Part{count - i});
}

template <bool INDEX, class T, class C>
void pool_plane(const RoiShape& s, const RoiWindows& box, const T* x, C* values, int_t<C>* firsts, int64_t at,
                const RoiPoolArgs& a) {
  // whole vectors, to the left if the map ends on the right
  constexpr int L = kLanes<C>;
  const int64_t span = larger(box.cols.high - box.cols.low, 0), whole = ceil_div(span, L) * L;
  const int64_t left = whole <= s.width ? smaller(box.cols.low, s.width - whole) : box.cols.low;
  const int64_t count = smaller(whole, s.width - left);
  for (int64_t oh = 0; oh < s.out_h; ++oh) {
    const RoiRange rows = box.windows[oh];
    if (rows.low < rows.high) pool_columns<INDEX>(x, s.width, rows, left, count, values, firsts);
    for (int64_t ow = 0; ow < s.out_w; ++ow, ++at) {
      const RoiRange cols = box.windows[s.out_h + ow];
      C best = before<C>(box, rows, cols);
      int64_t first = kNoRow, position = -1;
      for (int64_t col = rows.low < rows.high ? cols.low : cols.high; col < cols.high; ++col) {
        const C value = values[col - left];
        if constexpr (INDEX) {
          const int64_t row = firsts[col - left];
          const bool wins = (value > best) | ((value == best) & (row < first));
          best = wins ? value : best;
          first = wins ? row : first;
          position = wins ? row * s.width + col : position;
        } else {
          best = value > best ? value : best;
        }
      }
      from_compute(best, static_cast<T*>(a.out) + at);
      if constexpr (INDEX) a.argmax[at] = int32_t(position);
    }
  }
}

// Items are boxes, by image, for each block of channels in turn: its planes stay in the cache.
template <bool INDEX, class T, class C>
void pool_planes(const RoiPoolArgs& a, void* scratch, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  const int64_t pixels = s.height * s.width, bins = s.out_h * s.out_w;
  C* values = static_cast<C*>(scratch);
  int_t<C>* firsts = reinterpret_cast<int_t<C>*>(values + roi_pool_columns(s));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t k = a.order[item % s.rois], first = item / s.rois * a.block_channels;
    const int64_t last = smaller(first + a.block_channels, s.channels);
    const RoiWindows& box = a.boxes[k];
    const T* x = static_cast<const T*>(a.in) + (box.image * s.channels + first) * pixels;
    for (int64_t c = first; c < last; ++c, x += pixels) {
      pool_plane<INDEX>(s, box, x, values, firsts, (k * s.channels + c) * bins, a);
    }
  }
}

template <class T, class C>
void pool(const RoiPoolArgs& a, void* scratch, int64_t begin, int64_t end) {
  if (a.shape.channels_last) {
    a.argmax != nullptr ? pool_rows<true, T, C>(a, begin, end) : pool_rows<false, T, C>(a, begin, end);
  } else {
    a.argmax != nullptr ? pool_planes<true, T, C>(a, scratch, begin, end)
                        : pool_planes<false, T, C>(a, scratch, begin, end);
  }
}

}  // namespace

// Rows [begin, end) of the rois * out_h rows of bins in the channels-last layout; in the contiguous one boxes of each
// block of a.block_channels channels in turn.
void roi_pool_items(const RoiPoolArgs& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, pool<T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace pydl::PYDL_ISA

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, roi_pool_items, const RoiPoolArgs&, void*, int64_t, int64_t)

namespace {

void run(RoiPoolArgs& a) {
  const RoiShape& s = a.shape;
  if (s.rois * s.channels == 0) return;
  const int64_t window = 1 + s.height * s.width / (s.out_h * s.out_w) / 8;
  if (s.channels_last) {
    host::parallel(s.rois * s.out_h, s.out_w * s.channels * window,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(roi_pool_items)(a, nullptr, begin, end); });
    return;
  }
  a.block_channels = roi_block_channels(s, host::size_of(a.dtype), 8);
  const int64_t blocks = (s.channels + a.block_channels - 1) / a.block_channels;
  host::parallel(s.rois * blocks, s.out_h * s.out_w * a.block_channels * window, [&](int64_t begin, int64_t end) {
    const host::Scratch scratch(2 * roi_pool_columns(s) * host::size_of(host::compute_dtype(a.dtype)));
    PYDL_CPU_DISPATCH(roi_pool_items)(a, scratch.get(), begin, end);
  });
}

struct Pooled {
  Output y;
  std::optional<Output> argmax;
};

Pooled roi_pool(const Tensor& x_in, const Tensor& boxes, int64_t out_h, int64_t out_w, double scale, bool with_argmax) {
  const char* const op = "roi_pool";
  const RoiShape s = roi_shape(op, Array(x_in), Array(boxes), out_h, out_w, scale, 0, false);
  check_roi_positions(op, s.height, s.width);
  const Tensor x = dense_in(x_in, s.channels_last);
  const Array meta(x);
  const RoiStrides strides = roi_strides(s, s.rois, s.channels, out_h, out_w);
  Pooled out{empty_roi(strides, meta.dtype), std::nullopt};
  if (with_argmax) out.argmax = empty_roi(strides, Dtype::kInt32);
  const RoiPoolBoxes windows(op, s, boxes);
  RoiPoolArgs a = windows.args(s, meta.dtype);
  a.in = meta.data;
  a.out = out.y.data;
  a.argmax = with_argmax ? static_cast<int32_t*>(out.argmax->data) : nullptr;
  run(a);
  return out;
}

Tensor roi_pool_values(const Tensor& x, const Tensor& boxes, int64_t out_h, int64_t out_w, double scale) {
  return std::move(roi_pool(x, boxes, out_h, out_w, scale, false).y.tensor);
}

std::tuple<Tensor, Tensor> roi_pool_with_argmax(const Tensor& x, const Tensor& boxes, int64_t out_h, int64_t out_w,
                                                double scale) {
  Pooled out = roi_pool(x, boxes, out_h, out_w, scale, true);
  return {std::move(out.y.tensor), std::move(out.argmax->tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("roi_pool_values", TORCH_BOX(&roi_pool_values));
  m.impl("roi_pool_with_argmax", TORCH_BOX(&roi_pool_with_argmax));
}

}  // namespace
}  // namespace pydl

#endif
