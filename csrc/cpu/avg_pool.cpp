// Mean pooling, contiguous layout. A mean is separable: rows are added up along depth and height, whole vectors at a
// time, then along the width. The backward is the transpose of that, in the same loop nest, with every dy divided by
// its divisor as it is read; each element is written by one thread, once.
//
// Along the width, strides 1 and 2 are vectorised over the written columns: a row of sums is padded with zeros and, for
// stride 2, one of the two sides is split into even and odd positions. Other windows are added up one by one. In the
// backward, neighbours that depend on the same outputs are one run, and a row like the one above it is a copy.

#include "cpu/avg_pool.h"

#include "common/lanes.h"

namespace pydl {
namespace {

inline constexpr int64_t kSlack = 64;  // elements by which loads and stores run over, and a margin for the shifts

// Written columns from `first` up to the next run's, and the columns that all of them depend on.
struct MeanRun {
  int64_t first;
  Span<int64_t> sources;
};

// How the columns are added up, and the buffers behind a tile, in elements.
struct MeanTile {
  bool vector;    // windows of stride 1 or 2 over neighbouring columns
  bool planes;    // rows of several depths are added up first
  int64_t rows;   // rows read for tile_rows
  int64_t pitch;  // columns read for tile_cols
  int64_t phase;  // one half of the padded row
  int64_t cols;   // columns written
  int64_t lines;  // rows read or written, the more of the two

  int64_t elements() const { return (planes ? rows * pitch : 0) + lines + pitch + 2 * phase + 2 * cols; }
  int64_t bytes(int64_t element) const {
    return elements() * element + cols * int64_t(sizeof(MeanRun)) + lines * int64_t(sizeof(Span<int64_t>));
  }
};

// Most of `at` that `count` neighbours of one side depend on.
inline int64_t most_read(const PoolDim& d, int64_t count, bool forward) {
  const int64_t all = forward ? d.in : d.out;
  const int64_t most = d.adaptive ? (forward ? count * (d.in / d.out + 2) : count * (d.out / d.in + 2))
                       : forward  ? (count - 1) * d.stride + d.kernel
                                  : (count + d.kernel) / d.stride + 2;
  return most < all ? most : all;
}

inline MeanTile mean_tile(const PoolMean& a, bool forward) {
  const PoolShape& s = a.shape;
  MeanTile t;
  t.planes = s.d.in > 1 || s.d.out > 1;
  t.vector = !s.w.adaptive && s.w.stride <= 2 && s.w.kernel <= 256 && s.w.out > 3;
  t.rows = most_read(s.h, a.tile_rows, forward);
  t.pitch = most_read(s.w, a.tile_cols, forward) + kSlack;
  t.phase = (t.pitch > a.tile_cols ? t.pitch : a.tile_cols) + (t.vector ? 2 * s.w.kernel : 0) + kSlack;
  t.cols = a.tile_cols + kSlack;
  t.lines = t.rows > a.tile_rows ? t.rows : a.tile_rows;
  return t;
}

// A window that is the whole input.
inline bool is_global(const PoolShape& s) {
  const auto whole = [](const PoolDim& d) { return d.out == 1 && d.kernel - d.padding >= d.in; };
  return whole(s.d) && whole(s.h) && whole(s.w);
}

}  // namespace

namespace PYDL_ISA {
namespace {

template <class C>
struct MeanBuffers {
  MeanRun* runs;        // [cols], of the columns that are not vectorised
  Span<int64_t>* rows;  // [lines], what the written rows depend on
  C* planes;            // [rows][pitch], sums over depth
  C* row;               // [2][phase], sums over depth and height, padded with zeros
  C* shares;            // [pitch], the columns' part of the divisor; backward: its inverse
  C* line;              // [cols], what is written, before it is rounded
  C* weights;           // [lines], the written rows' part of the divisor; backward: of the read ones, inverted
};

// The part of a plane that is written together, and what it depends on.
struct Tile {
  int64_t plane, depth;
  int64_t first_row, last_row, first_col, last_col;
  int64_t runs;         // columns that are not vectorised
  int64_t left, right;  // columns read
  int64_t top, bottom;  // rows read
  int64_t origin;       // column at position 0 of the padded row
};

// Sum of n neighbours, N if that is known at compile time.
template <int N, class C>
inline Vec<C> sum_of(const C* p, int64_t n) {
  Vec<C> sum = {};
  for (int64_t i = 0; i < (N > 0 ? N : n); ++i) sum += load(p + i);
  return sum;
}

// Two sums, or one, of neighbours from `first` and `second` on.
struct Taps {
  int64_t first, first_count, second, second_count;
};

// Columns of the written row behind vector o, from the padded row.
template <bool FORWARD, int N0, int N1, class T, class C>
void add_columns(const MeanBuffers<C>& b, const Taps& taps, bool two, int64_t n, C divisor, T* to) {
  constexpr int L = kLanes<C>;
  const C *first = b.row + taps.first, *second = b.row + taps.second;
  const auto put = [&](int64_t o, Vec<C> v) {
    if constexpr (FORWARD) v /= load(b.shares + o) * splat(divisor);
    if (o + L <= n) {
      store(to + o, v);
    } else if (o < n) {
      store(to + o, v, Part{n - o});
    }
  };
  if (FORWARD || !two) {
    for (int64_t o = 0; o < n; o += L) {
      put(o, sum_of<N0>(first + o, taps.first_count) + sum_of<N1>(second + o, taps.second_count));
    }
  } else {
    for (int64_t o = 0; o < n; o += 2 * L) {
      const Vec<C> evens = sum_of<N0>(first + o / 2, taps.first_count);
      const Vec<C> odds = sum_of<N1>(second + o / 2, taps.second_count);
      put(o, interleave_low(evens, odds));
      put(o + L, interleave_high(evens, odds));
    }
  }
}

// The taps of the first column of a tile, from the padded row's position 0 on.
template <bool FORWARD>
Taps taps_of(const PoolDim& w, const Tile& r, int64_t phase) {
  const int64_t k = w.kernel, p = w.padding;
  if (w.stride == 1) return {0, k, 0, 0};
  if (FORWARD) return {0, (k + 1) / 2, phase, k / 2};
  // Even columns 2 * m read outputs m + p / 2 - t with taps 2 * t + (p & 1), odd ones m + (p + 1) / 2 - t.
  const int64_t even_count = (k - (p & 1) + 1) / 2, odd_count = (k - (~p & 1) + 1) / 2;
  const int64_t even = r.first_col / 2 + p / 2 - even_count + 1, odd = r.first_col / 2 + (p + 1) / 2 - odd_count + 1;
  return {even - r.origin, even_count, odd - r.origin, odd_count};
}
// The column at position 0 of the padded row.
template <bool FORWARD>
int64_t origin_of(const PoolDim& w, int64_t first_col) {
  if (FORWARD) return first_col * w.stride - w.padding;
  if (w.stride == 1) return first_col + w.padding - w.kernel + 1;
  return first_col / 2 + w.padding / 2 - (w.kernel + 1) / 2;
}

inline bool same(Span<int64_t> a, Span<int64_t> b) { return a.first == b.first && a.last == b.last; }

// Sets what depends on a tile's rows only.
template <bool FORWARD, class C>
void enter_rows(const PoolMean& a, const MeanTile& t, const MeanBuffers<C>& b, Tile& r) {
  const PoolDim& h = a.shape.h;
  r.top = sources<FORWARD>(h, r.first_row).first;
  r.bottom = sources<FORWARD>(h, r.last_row - 1).last;
  for (int64_t row = r.first_row; row < r.last_row; ++row) {
    b.rows[row - r.first_row] = sources<FORWARD>(h, row);
    if (FORWARD) b.weights[row - r.first_row] = share<C>(a, h, row);
  }
  if (FORWARD) return;
  const C depth = t.planes ? C(1) : depth_share<C>(a, 0);
  for (int64_t row = r.top; row < r.bottom; ++row) b.weights[row - r.top] = 1 / (depth * share<C>(a, h, row));
}

// Sets what depends on a tile's columns only.
template <bool FORWARD, class C>
void enter_columns(const PoolMean& a, const MeanTile& t, const MeanBuffers<C>& b, Tile& r) {
  const PoolDim& w = a.shape.w;
  r.left = sources<FORWARD>(w, r.first_col).first;
  r.right = larger(r.left, sources<FORWARD>(w, r.last_col - 1).last);
  r.left = smaller(r.left, r.right);
  r.origin = t.vector ? origin_of<FORWARD>(w, r.first_col) : r.left;
  for (int64_t i = 0; i < 2 * t.phase; ++i) b.row[i] = 0;
  const int64_t first = FORWARD ? r.first_col : r.left, last = FORWARD ? r.last_col : r.right;
  for (int64_t o = first; o < last; ++o) {
    const C part = share<C>(a, w, o);
    b.shares[o - first] = FORWARD ? part : 1 / part;
  }
  r.runs = 0;
  for (int64_t i = r.first_col; !t.vector && i < r.last_col; ++i) {
    const Span<int64_t> span = sources<FORWARD>(w, i), from{span.first - r.left, span.last - r.left};
    if (FORWARD || r.runs == 0 || !same(b.runs[r.runs - 1].sources, from)) b.runs[r.runs++] = {i - r.first_col, from};
  }
  b.runs[r.runs].first = r.last_col - r.first_col;
  for (int64_t i = last - first; FORWARD && i < t.cols; ++i) b.shares[i] = 1;
}

// Adds up rows [rows.first, rows.last) of `source`, columns [left, right), into the padded row.
template <bool FORWARD, class S, class C>
void add_rows(const PoolMean& a, const MeanTile& t, const MeanBuffers<C>& b, const Tile& r, const S* source,
              int64_t pitch, Span<int64_t> rows) {
  const int64_t n = r.right - r.left, at = r.left - r.origin;
  const auto column = [&](int64_t i, auto extent) {
    Vec<C> sum = {};
    for (int64_t row = rows.first; row < rows.last; ++row) {
      const Vec<C> v = load(source + row * pitch + i, extent);
      if constexpr (FORWARD) {
        sum += v;
      } else {
        sum += v * splat(b.weights[row - r.top]);
      }
    }
    if constexpr (!FORWARD) sum *= load(b.shares + i);
    return sum;
  };
  if (!FORWARD || !t.vector || a.shape.w.stride == 1) {
    sweep<C>(n, [&](int64_t i, int, auto extent) { store(b.row + at + i, column(i, extent), extent); });
    return;
  }
  constexpr int L = kLanes<C>;
  C* first = b.row + (at & 1) * t.phase + at / 2;
  C* second = b.row + (~at & 1) * t.phase + (at + 1) / 2;
  for (int64_t i = 0; i < n; i += 2 * L) {
    const Vec<C> low = i + L <= n ? column(i, Whole{}) : column(i, Part{n - i});
    Vec<C> high = {};
    if (i + 2 * L <= n) {
      high = column(i + L, Whole{});
    } else if (i + L < n) {
      high = column(i + L, Part{n - i - L});
    }
    store(first + i / 2, even(low, high));
    store(second + i / 2, odd(low, high));
  }
}

template <class C>
inline C sum_of_range(const C* p, int64_t n) {
  C total = 0;
  if (n < kLanes<C>) {
    for (int64_t i = 0; i < n; ++i) total += p[i];
    return total;
  }
  Vec<C> parts[4] = {};
  sweep<C>(n, [&](int64_t i, int slot, auto extent) { parts[slot] += load(p + i, extent); });
  return sum(add_up(parts));
}

// Columns that are not vectorised: the range behind each run is added up.
template <bool FORWARD, class T, class C>
void add_ranges(const MeanBuffers<C>& b, const Tile& r, C divisor, T* to) {
  const int64_t n = r.last_col - r.first_col;
  for (int64_t k = 0; k < r.runs; ++k) {
    const Span<int64_t> span = b.runs[k].sources;
    if constexpr (FORWARD) {
      b.line[k] = sum_of_range(b.row + span.first, span.last - span.first) / (b.shares[k] * divisor);
    } else {  // most elements belong to one window or none; what runs over is the next run's
      C total = span.first < span.last ? b.row[span.first] : C(0);
      for (int64_t o = span.first + 1; o < span.last; ++o) total += b.row[o];
      const int64_t last = b.runs[k + 1].first;
      for (int64_t i = b.runs[k].first; i < last; i += kLanes<C>) store(b.line + i, splat(total));
    }
  }
  sweep<C>(n, [&](int64_t i, int, auto extent) { store(to + i, load(b.line + i, extent), extent); });
}

template <bool FORWARD, class T, class C>
void write_row(const PoolMean& a, const MeanTile& t, const MeanBuffers<C>& b, const Tile& r, C divisor, T* to) {
  if (!t.vector) return add_ranges<FORWARD>(b, r, divisor, to);
  const PoolDim& w = a.shape.w;
  const Taps taps = taps_of<FORWARD>(w, r, t.phase);
  const int64_t n = r.last_col - r.first_col, n0 = taps.first_count, n1 = taps.second_count;
  const bool two = w.stride == 2;
  if (n0 == 3 && n1 == 0) return add_columns<FORWARD, 3, 0>(b, taps, two, n, divisor, to);
  if (n0 == 2 && n1 == 1) return add_columns<FORWARD, 2, 1>(b, taps, two, n, divisor, to);
  if (n0 == 1 && n1 == 2) return add_columns<FORWARD, 1, 2>(b, taps, two, n, divisor, to);
  if (n0 == 1 && n1 == 1) return add_columns<FORWARD, 1, 1>(b, taps, two, n, divisor, to);
  add_columns<FORWARD, 0, 0>(b, taps, two, n, divisor, to);
}

// Rows [rows.first, rows.last) of the depths that a tile reads, added up.
template <bool FORWARD, class T, class C>
void add_depths(const PoolMean& a, const MeanTile& t, const MeanBuffers<C>& b, const Tile& r, const T* plane,
                Span<int64_t> rows) {
  const int64_t height = read<FORWARD>(a.shape.h), width = read<FORWARD>(a.shape.w);
  const Span<int64_t> depths = sources<FORWARD>(a.shape.d, r.depth);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    C* sums = b.planes + (row - rows.first) * t.pitch;
    sweep<C>(r.right - r.left, [&](int64_t i, int, auto extent) {
      Vec<C> sum = {};
      for (int64_t d = depths.first; d < depths.last; ++d) {
        Vec<C> v = load(plane + (d * height + row) * width + r.left + i, extent);
        if constexpr (!FORWARD) v *= splat(1 / depth_share<C>(a, d));
        sum += v;
      }
      store(sums + i, sum, extent);
    });
  }
}

template <bool FORWARD, class T, class C>
void write_tile(const PoolMean& a, const MeanTile& t, const MeanBuffers<C>& b, Tile& r) {
  const PoolShape& s = a.shape;
  const int64_t height = written<FORWARD>(s.h), width = written<FORWARD>(s.w), read_width = read<FORWARD>(s.w);
  const T* plane = static_cast<const T*>(a.from) + r.plane * read<FORWARD>(s.d) * read<FORWARD>(s.h) * read_width;
  T* to = static_cast<T*>(a.to) + ((r.plane * written<FORWARD>(s.d) + r.depth) * height + r.first_row) * width;
  to += r.first_col;
  if (t.planes) add_depths<FORWARD>(a, t, b, r, plane, {r.top, r.bottom});
  const C depth = FORWARD ? depth_share<C>(a, r.depth) : C(1);
  for (int64_t row = 0; row < r.last_row - r.first_row; ++row, to += width) {
    const Span<int64_t> rows = b.rows[row];
    if (!FORWARD && row > 0 && same(rows, b.rows[row - 1])) {
      __builtin_memcpy(to, to - width, size_t(r.last_col - r.first_col) * sizeof(T));
      continue;
    }
    if (t.planes) {
      add_rows<FORWARD>(a, t, b, r, b.planes - r.top * t.pitch, t.pitch, rows);
    } else {
      add_rows<FORWARD>(a, t, b, r, plane + r.left, read_width, rows);
    }
    write_row<FORWARD>(a, t, b, r, FORWARD ? depth * b.weights[row] : C(1), to);
  }
}

// Items are tiles of (plane, depth), columns slowest, so that a thread seldom changes them.
template <bool FORWARD, class T, class C>
void mean_tiles(const PoolMean& a, void* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const MeanTile t = mean_tile(a, FORWARD);
  const int64_t height = written<FORWARD>(s.h), width = written<FORWARD>(s.w), depth = written<FORWARD>(s.d);
  const int64_t row_tiles = ceil_div(height, a.tile_rows), slices = s.batch * s.channels * depth * row_tiles;
  MeanBuffers<C> b;
  b.runs = static_cast<MeanRun*>(scratch);
  b.rows = reinterpret_cast<Span<int64_t>*>(b.runs + t.cols);
  b.row = reinterpret_cast<C*>(b.rows + t.lines);
  b.planes = b.row + 2 * t.phase;
  b.shares = b.planes + (t.planes ? t.rows * t.pitch : 0);
  b.line = b.shares + t.pitch + t.cols;
  b.weights = b.line + t.cols;
  Tile r;
  r.first_col = r.first_row = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_col = item / slices * a.tile_cols, slice = item % slices;
    r.plane = slice / (depth * row_tiles);
    r.depth = slice / row_tiles % depth;
    const int64_t first_row = slice % row_tiles * a.tile_rows;
    if (r.first_row != first_row) {
      r.first_row = first_row;
      r.last_row = smaller(first_row + a.tile_rows, height);
      enter_rows<FORWARD>(a, t, b, r);
    }
    if (r.first_col != first_col) {
      r.first_col = first_col;
      r.last_col = smaller(first_col + a.tile_cols, width);
      enter_columns<FORWARD>(a, t, b, r);
    }
    write_tile<FORWARD, T>(a, t, b, r);
  }
}

}  // namespace

// Tiles [begin, end) of the contiguous layout.
void avg_pool_tiles(const PoolMean& a, bool forward, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, forward ? mean_tiles<true, T, compute_t<T>>(a, scratch, begin, end)
                                     : mean_tiles<false, T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, avg_pool_tiles, const PoolMean&, bool, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, avg_pool_planes, const PoolMean&, bool, int64_t, int64_t)
PYDL_CPU_DECLARE(void, avg_pool_rows, const PoolMean&, bool, void*, int64_t, int64_t)

namespace {

void run_contiguous(PoolMean& a, bool forward) {
  const PoolShape& s = a.shape;
  const int64_t planes = s.batch * s.channels, inputs = s.d.in * s.h.in * s.w.in;
  if (is_global(s)) {
    host::parallel(planes, inputs / 2 + 1,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(avg_pool_planes)(a, forward, begin, end); });
    return;
  }
  const int64_t width = forward ? s.w.out : s.w.in, height = forward ? s.h.out : s.h.in;
  a.tile_cols = std::min<int64_t>(width, 512);
  a.tile_rows = std::clamp<int64_t>(32768 / a.tile_cols, 1, height);
  const int64_t bytes = mean_tile(a, forward).bytes(host::size_of(host::compute_dtype(a.dtype)));
  const int64_t tiles = ((height + a.tile_rows - 1) / a.tile_rows) * ((width + a.tile_cols - 1) / a.tile_cols);
  const int64_t work = a.tile_rows * (most_read(s.w, a.tile_cols, forward) * most_read(s.d, 1, forward) + a.tile_cols);
  host::parallel(planes * (forward ? s.d.out : s.d.in) * tiles, work, [&](int64_t begin, int64_t end) {
    const host::Scratch scratch(bytes);
    PYDL_CPU_DISPATCH(avg_pool_tiles)(a, forward, scratch.get(), begin, end);
  });
}

void run_channels_last(PoolMean& a, bool forward) {
  const PoolShape& s = a.shape;
  const int64_t rows = s.batch * (forward ? s.d.out * s.h.out : s.d.in * s.h.in), width = forward ? s.w.out : s.w.in;
  // Few rows leave threads without work unless channels are shared out too.
  a.channel_block = rows >= 64 ? std::max<int64_t>(s.channels, 1) : 128;
  const int64_t blocks = (s.channels + a.channel_block - 1) / a.channel_block;
  const int64_t taps = most_read(s.d, 1, forward) * most_read(s.h, 1, forward) * most_read(s.w, width, forward);
  const int64_t bytes = (s.d.out + s.h.out + s.w.out) * host::size_of(host::compute_dtype(a.dtype));
  host::parallel(rows * blocks, std::min(s.channels, a.channel_block) * (taps + width),
                 [&](int64_t begin, int64_t end) {
                   const host::Scratch scratch(bytes);
                   PYDL_CPU_DISPATCH(avg_pool_rows)(a, forward, scratch.get(), begin, end);
                 });
}

Tensor mean(const char* op, const Tensor& given, const PoolShape& s, bool forward, bool include_padding,
            std::optional<int64_t> divisor) {
  STD_TORCH_CHECK(divisor.value_or(1) != 0, op, ": divisor must not be zero");
  const Tensor from = dense_in(given, s.channels_last);
  const Array meta(from);
  Output to = empty_pool(s, forward, meta.dtype);
  PoolMean a{s, meta.data, to.data, include_padding, divisor.value_or(0), meta.dtype, 0, 0, 0};
  const int64_t outputs = s.d.out * s.h.out * s.w.out;
  if (s.batch * s.channels == 0 || (forward && outputs == 0)) return std::move(to.tensor);
  if (s.channels_last) {
    run_channels_last(a, forward);
  } else {
    run_contiguous(a, forward);
  }
  return std::move(to.tensor);
}

Tensor avg_pool_fwd(const Tensor& x, const Sizes& window, bool include_padding, std::optional<int64_t> divisor) {
  const char* const op = "avg_pool_fwd";
  return mean(op, x, mean_shape(op, x, window, true), true, include_padding, divisor);
}

Tensor avg_pool_bwd(const Tensor& dy, const Sizes& window, bool include_padding, std::optional<int64_t> divisor,
                    bool channels_last) {
  const char* const op = "avg_pool_bwd";
  PoolShape s = mean_shape(op, dy, window, false);
  s.channels_last = channels_last;
  return mean(op, dy, s, false, include_padding, divisor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("avg_pool_fwd", TORCH_BOX(&avg_pool_fwd));
  m.impl("avg_pool_bwd", TORCH_BOX(&avg_pool_bwd));
}

}  // namespace
}  // namespace pydl

#endif
