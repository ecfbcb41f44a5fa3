// Max pooling, forward. NaN propagates; the first maximum of a window wins, and of several NaN the last, as in torch.
//
// Contiguous layout: each input row is first pooled along its width (vectorised over output columns), the results then
// along the height; both passes visit taps in ascending order with a strict comparison, so the tap that wins is the
// first in row-major order. Before that a row is copied into a buffer that is padded with -inf and split into `stride`
// phases, so that the taps of neighbouring outputs are neighbours and no pass knows about borders or strides.

#include "cpu/max_pool_window.h"

namespace pydl {
namespace {

// Sizes of the buffers behind a tile of the contiguous layout, in elements.
struct PoolTile {
  int64_t in_rows;   // input rows behind tile_rows output rows
  int64_t phases;    // phases that a padded input row is split into
  int64_t phase;     // elements of one of them
  int64_t taps;      // taps of a row that can lie inside the input
  int64_t out_cols;  // one row of values pooled along the width

  int64_t padded() const { return in_rows * phases * phase; }
  int64_t pooled() const { return in_rows * out_cols; }
  int64_t bytes(int64_t element, bool indices) const {
    return taps * 8 + (padded() + pooled() * (indices ? 2 : 1) + out_cols) * element;
  }
};

inline PoolTile pool_tile(const PoolShape& s, int64_t tile_rows, int64_t tile_cols) {
  constexpr int64_t kSlack = 16;  // lanes of the widest vector: loads and stores run over by less
  PoolTile t;
  const int64_t rows = (tile_rows - 1) * s.h.stride + (s.h.kernel - 1) * s.h.dilation + 1;
  t.in_rows = rows < s.h.in ? rows : s.h.in;
  const int64_t reach = (s.w.in + s.w.padding + s.w.dilation - 1) / s.w.dilation;
  t.taps = s.w.kernel < reach ? s.w.kernel : reach;
  const int64_t length = (tile_cols - 1) * s.w.stride + (t.taps - 1) * s.w.dilation + 1;
  t.phases = s.w.stride < 3 || s.w.stride < length ? s.w.stride : length;
  t.phase = (length + s.w.stride - 1) / s.w.stride + 2 * kSlack;
  t.out_cols = (tile_cols + kSlack - 1) / kSlack * kSlack;
  return t;
}

}  // namespace

namespace PYDL_ISA {
namespace {

// ---- contiguous layout

// One thread's buffers, used for tile after tile.
template <class C>
struct PoolBuffers {
  int64_t* tap_start;   // [taps], where a tap of output 0 lies in a padded row
  C* padded;            // [in_rows][phases][phase]
  C* pooled;            // [in_rows][out_cols]
  int_t<C>* taps;       // [in_rows][out_cols], column taps of the pooled values
  int_t<C>* first_tap;  // [out_cols], the first tap inside the input
};

// Which part of the image a tile covers.
struct TileRange {
  int64_t first_row, last_row;  // output rows
  int64_t first_col, last_col;  // output columns
  int64_t top, bottom;          // input rows
};

// Copies an input row's columns to its padded and phase-split form; true if it holds a NaN.
template <class T, class C>
bool split_row(const PoolDim& d, const PoolTile& t, const TileRange& r, const T* x, C* padded) {
  const int64_t origin = r.first_col * d.stride - d.padding;  // input column at position 0 of the padded row
  const int64_t from = larger(0, -origin);
  const int64_t length = (r.last_col - r.first_col - 1) * d.stride + (t.taps - 1) * d.dilation + 1;
  const int64_t n = smaller(length, d.in - origin) - from;
  x += origin + from;
  const Vec<C> empty = splat(-kInfinity<C>);
  constexpr int L = kLanes<C>;
  Mask<C> nan = {};
  if (d.stride == 1) {
    sweep<C>(n, [&](int64_t i, int, auto extent) {
      const Vec<C> v = load(x + i, extent, empty);
      nan |= is_nan(v);
      store(padded + from + i, v);
    });
    return any<C>(nan);
  }
  if (d.stride == 2) {
    C* first = padded + (from & 1) * t.phase + from / 2;
    C* second = padded + (~from & 1) * t.phase + (from + 1) / 2;
    const auto pair = [&](int64_t i, Vec<C> a, Vec<C> b) {
      nan |= is_nan(a) | is_nan(b);
      store(first + i / 2, even(a, b));
      store(second + i / 2, odd(a, b));
    };
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L) pair(i, load(x + i), load(x + i + L));
    if (n - i > L) {
      pair(i, load(x + i), load(x + i + L, Part{n - i - L}, empty));
    } else if (n > i) {
      pair(i, load(x + i, Part{n - i}, empty), empty);
    }
    return any<C>(nan);
  }
  bool seen = false;
  int64_t phase = from % d.stride, slot = from / d.stride;
  for (int64_t i = 0; i < n; ++i) {
    if (phase < t.phases) {
      const C v = to_compute(x[i]);
      seen |= v != v;
      padded[phase * t.phase + slot] = v;
    }
    if (++phase == d.stride) {
      phase = 0;
      ++slot;
    }
  }
  return seen;
}

// Pools `rows` padded rows along their width. KERNEL: number of taps, 0 if not known at compile time.
template <int KERNEL, bool INDEX, bool NAN_SEEN, class C>
void pool_width(const PoolTile& t, const PoolBuffers<C>& b, int64_t rows, int64_t cols) {
  const int64_t taps = KERNEL > 0 ? KERNEL : t.taps;
  int64_t known_start[KERNEL > 0 ? KERNEL : 1];
  for (int64_t tap = 0; tap < KERNEL; ++tap) known_start[tap] = b.tap_start[tap];
  const int64_t* start = KERNEL > 0 ? known_start : b.tap_start;
  for (int64_t row = 0; row < rows; ++row) {
    const C* padded = b.padded + row * t.phases * t.phase;
    C* pooled = b.pooled + row * t.out_cols;
    for (int64_t o = 0; o < cols; o += kLanes<C>) {
      Best<C, INDEX, NAN_SEEN> best{splat(-kInfinity<C>), {}};
      if constexpr (INDEX) best.tap = load_raw(b.first_tap + o, Whole{}, IntVec<C>{});
      for (int64_t tap = 0; tap < taps; ++tap) {
        best.take(load(padded + start[tap] + o), splat_int<C>(tap));
      }
      store(pooled + o, best.value);
      if constexpr (INDEX) store_raw(b.taps + row * t.out_cols + o, best.tap, Whole{});
    }
  }
}

// Pools along the height and writes the tile's outputs; `plane` is the number of the plane.
template <bool INDEX, bool NAN_SEEN, class T, class C>
void pool_height(const PoolFwd& a, const PoolTile& t, const PoolBuffers<C>& b, const TileRange& r, int64_t plane) {
  const PoolDim &h = a.shape.h, &w = a.shape.w;
  for (int64_t oh = r.first_row; oh < r.last_row; ++oh) {
    const Span<int64_t> taps = inner_taps(h, oh);
    const int64_t start = oh * h.stride - h.padding, position = (plane * h.out + oh) * w.out + r.first_col;
    const int64_t window = start * w.in + r.first_col * w.stride - w.padding;
    T* y = static_cast<T*>(a.y) + position;
    const auto outputs = [&](int64_t o, auto extent) {
      Best<C, INDEX, NAN_SEEN> best{splat(-kInfinity<C>), {}};
      if constexpr (INDEX) {
        best.tap = load_raw(b.first_tap + o, Whole{}, IntVec<C>{}) + splat_int<C>(taps.first * w.kernel);
      }
      for (int64_t tap = taps.first; tap < taps.last; ++tap) {
        const int64_t from = (start + tap * h.dilation - r.top) * t.out_cols + o;
        IntVec<C> number = {};
        if constexpr (INDEX) {
          number = load_raw(b.taps + from, Whole{}, IntVec<C>{}) + splat_int<C>(tap * w.kernel);
        }
        best.take(load(b.pooled + from), number);
      }
      store(y + o, best.value, extent);
      if constexpr (INDEX) {
        store_indices<C>(a, position + o, window + o * w.stride, w.stride, best.tap, extent);
      }
    };
    const int64_t cols = r.last_col - r.first_col;
    int64_t o = 0;
    for (; o + kLanes<C> <= cols; o += kLanes<C>) outputs(o, Whole{});
    if (o < cols) outputs(o, Part{cols - o});
  }
}

template <bool INDEX, bool NAN_SEEN, class T, class C>
void pool_tile_outputs(const PoolFwd& a, const PoolTile& t, const PoolBuffers<C>& b, const TileRange& r,
                       int64_t plane) {
  const int64_t rows = r.bottom - r.top, cols = r.last_col - r.first_col;
  if (t.taps == 2) {
    pool_width<2, INDEX, NAN_SEEN>(t, b, rows, cols);
  } else if (t.taps == 3) {
    pool_width<3, INDEX, NAN_SEEN>(t, b, rows, cols);
  } else {
    pool_width<0, INDEX, NAN_SEEN>(t, b, rows, cols);
  }
  pool_height<INDEX, NAN_SEEN, T>(a, t, b, r, plane);
}

// Items are the tiles, columns slowest, so that a thread changes its padding rarely.
template <class T, class C>
void contiguous_tiles(const PoolFwd& a, void* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const PoolDim &h = s.h, &w = s.w;
  const PoolTile t = pool_tile(s, a.tile_rows, a.tile_cols);
  const int64_t planes = s.batch * s.channels, row_tiles = (h.out + a.tile_rows - 1) / a.tile_rows;
  PoolBuffers<C> b;
  b.tap_start = static_cast<int64_t*>(scratch);
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const int64_t position = tap * w.dilation;
    b.tap_start[tap] = position % w.stride * t.phase + position / w.stride;
  }
  b.padded = reinterpret_cast<C*>(b.tap_start + t.taps);
  b.pooled = b.padded + t.padded();
  b.taps = reinterpret_cast<int_t<C>*>(b.pooled + t.pooled());
  b.first_tap = b.taps + (a.indices != nullptr ? t.pooled() : 0);
  int64_t column_tile = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item % (planes * row_tiles) / row_tiles, row_tile = item % row_tiles;
    TileRange r;
    r.first_row = row_tile * a.tile_rows;
    r.last_row = smaller(r.first_row + a.tile_rows, h.out);
    r.first_col = item / (planes * row_tiles) * a.tile_cols;
    r.last_col = smaller(r.first_col + a.tile_cols, w.out);
    r.top = smaller(h.in, larger(0, r.first_row * h.stride - h.padding));
    const int64_t last = (r.last_row - 1) * h.stride - h.padding + (h.kernel - 1) * h.dilation;
    r.bottom = larger(r.top, smaller(h.in, last + 1));
    if (column_tile != r.first_col) {
      column_tile = r.first_col;
      for (int64_t i = 0; i < t.padded(); ++i) b.padded[i] = -kInfinity<C>;
      for (int64_t o = 0; o < t.out_cols; ++o) b.first_tap[o] = int_t<C>(inner_taps(w, r.first_col + o).first);
    }
    const T* x = static_cast<const T*>(a.x) + plane * h.in * w.in;
    bool nan_seen = false;
    for (int64_t row = r.top; row < r.bottom; ++row) {
      nan_seen |= split_row(w, t, r, x + row * w.in, b.padded + (row - r.top) * t.phases * t.phase);
    }
    if (a.indices == nullptr) {
      nan_seen ? pool_tile_outputs<false, true, T>(a, t, b, r, plane)
               : pool_tile_outputs<false, false, T>(a, t, b, r, plane);
    } else {
      nan_seen ? pool_tile_outputs<true, true, T>(a, t, b, r, plane)
               : pool_tile_outputs<true, false, T>(a, t, b, r, plane);
    }
  }
}

}  // namespace

// Tiles [begin, end) of the contiguous layout.
void max_pool_tiles(const PoolFwd& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, contiguous_tiles<T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, max_pool_tiles, const PoolFwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_uneven, const PoolFwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_rows, const PoolFwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_outputs, const PoolFwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_planes, const PoolFwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_volumes, const PoolFwd&, void*, int64_t, int64_t)

namespace {

// Tiles of up to 512 columns whose buffers take about 48 KiB, but at least so many rows that few are read twice.
void choose_tile(PoolFwd& a, int64_t element) {
  const PoolShape& s = a.shape;
  a.tile_cols = std::min<int64_t>(s.w.out, 512);
  const PoolTile one = pool_tile(s, 1, a.tile_cols);
  const int64_t row = (one.phases * one.phase + one.out_cols * (a.indices != nullptr ? 2 : 1)) * element;
  const int64_t shared = std::max<int64_t>((s.h.kernel - 1) * s.h.dilation + 1 - s.h.stride, 0);
  const int64_t in_rows = std::max(49152 / row, 4 * shared);
  a.tile_rows = std::min(s.h.out, std::max<int64_t>(in_rows / s.h.stride, 1));
}

void run_contiguous(PoolFwd& a) {
  const PoolShape& s = a.shape;
  const int64_t element = host::size_of(host::compute_dtype(a.dtype)), planes = s.batch * s.channels;
  int64_t tiles, work;
  if (uneven(s)) {
    a.tile_bytes = s.w.out * 24 + 4 * uneven_pitch(s.w) * element;
    tiles = s.h.out;
    work = s.w.in * (s.h.kernel + 4);
  } else {
    choose_tile(a, element);
    a.tile_bytes = pool_tile(s, a.tile_rows, a.tile_cols).bytes(element, a.indices != nullptr);
    tiles = ((s.h.out + a.tile_rows - 1) / a.tile_rows) * ((s.w.out + a.tile_cols - 1) / a.tile_cols);
    work = a.tile_rows * a.tile_cols * (s.h.stride * s.w.stride + s.w.kernel);
  }
  a.tile_bytes = (a.tile_bytes + 63) / 64 * 64;
  if (s.d.in == 1 && s.d.out == 1 && s.d.kernel == 1) {
    const auto run = uneven(s) ? PYDL_CPU_DISPATCH(max_pool_uneven) : PYDL_CPU_DISPATCH(max_pool_tiles);
    host::parallel(planes * tiles, work, [&](int64_t begin, int64_t end) {
      const host::Scratch scratch(a.tile_bytes);
      run(a, scratch.get(), begin, end);
    });
    return;
  }
  a.slice_tiles = tiles;
  const int64_t per_value = host::size_of(a.dtype) + (a.indices == nullptr ? 0 : a.flat ? 8 : 1);
  const int64_t bytes = a.tile_bytes + s.d.in * s.h.out * s.w.out * per_value + 8;
  host::parallel(planes, tiles * work * s.d.in, [&](int64_t begin, int64_t end) {
    const host::Scratch scratch(bytes);
    PYDL_CPU_DISPATCH(max_pool_volumes)(a, scratch.get(), begin, end);
  });
}

struct Pooled {
  Output y;
  std::optional<Output> indices;
};

// Where in a plane the taps lie from their window's origin, in the order of their numbers.
Sizes flat_taps(const PoolShape& s) {
  Sizes places;
  places.reserve(size_t(taps_of(s)));
  for (int64_t i = 0; i < s.d.kernel; ++i) {
    for (int64_t j = 0; j < s.h.kernel; ++j) {
      for (int64_t k = 0; k < s.w.kernel; ++k) {
        places.push_back((i * s.d.dilation * s.h.in + j * s.h.dilation) * s.w.in + k * s.w.dilation);
      }
    }
  }
  return places;
}

// One window whose taps are the input's elements, so that a tap's number is its position.
bool whole(const PoolDim& d) { return d.out == 1 && d.kernel == d.in && d.padding == 0 && d.dilation == 1; }

Pooled max_pool_fwd(const Tensor& x_in, const PoolShape& s, bool with_indices, bool flat) {
  const Tensor x = dense_in(x_in, s.channels_last);
  const Array meta(x);
  Pooled out{empty_pool(s, true, meta.dtype), std::nullopt};
  if (with_indices) out.indices = empty_pool(s, true, flat ? Dtype::kInt64 : Dtype::kUInt8);
  const int64_t outputs = s.batch * s.channels * s.d.out * s.h.out * s.w.out;
  if (outputs == 0) return out;
  PoolFwd a{s, meta.data, out.y.data, with_indices ? out.indices->data : nullptr, nullptr, flat, meta.dtype};
  if (!s.channels_last && whole(s.d) && whole(s.h) && whole(s.w)) {
    host::parallel(outputs, s.d.in * s.h.in * s.w.in / 2 + 16,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_planes)(a, begin, end); });
    return out;
  }
  // Windows that are mostly padding, or more taps or places than the kernels number, are not worth a vector.
  const bool places_fit = (s.h.kernel << column_bits(s.w)) <= INT32_MAX;
  const bool fit = !s.channels_last && uneven(s) ? places_fit : taps_of(s) <= 65536 && s.w.padding <= s.w.in + 64;
  if (!fit) {
    host::parallel(outputs, inner_window(s),
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_outputs)(a, begin, end); });
    return out;
  }
  Sizes places;
  if (with_indices && flat) {
    places = flat_taps(s);
    a.flat_tap = places.data();
  }
  if (s.channels_last) {
    host::parallel(s.batch * s.d.out * s.h.out, s.w.out * s.channels * inner_window(s) / 2 + 1,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_rows)(a, begin, end); });
  } else {
    run_contiguous(a);
  }
  return out;
}

Tensor max_pool_values(const Tensor& x, const Sizes& window, bool ceil_mode) {
  const PoolShape s = forward_shape("max_pool_values", x, window, ceil_mode);
  return std::move(max_pool_fwd(x, s, false, false).y.tensor);
}

std::tuple<Tensor, Tensor> max_pool_with_indices(const Tensor& x, const Sizes& window, bool ceil_mode, bool flat) {
  const PoolShape s = forward_shape("max_pool_with_indices", x, window, ceil_mode);
  Pooled out = max_pool_fwd(x, s, true, flat || !offsets_fit(s));
  return {std::move(out.y.tensor), std::move(out.indices->tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("max_pool_values", TORCH_BOX(&max_pool_values));
  m.impl("max_pool_with_indices", TORCH_BOX(&max_pool_with_indices));
}

}  // namespace
}  // namespace pydl

#endif
