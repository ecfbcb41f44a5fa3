// Batch statistics: mean and sum of squared deviations of each chunk in one pass over shifted data, in a second if the
// shift was poor (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983). Chunks are merged in
// double, in their order.

#include "cpu/batch_norm_kernels.h"

namespace pydl::PYDL_ISA {
namespace {

// A shift further from the mean than this many variances, squared, costs digits: the chunk is read again.
constexpr double kPoor = 4;

struct Moments {
  double mean, squares;
};

// ---- planes

template <class T, class C>
struct PlaneChunk {
  const BatchNorm& a;
  int64_t channel, first, last;

  template <class F>
  void each(F&& f) const {
    each_piece(a.shape, a.cut, channel, first, last,
               [&](const Piece& piece) { f(static_cast<const T*>(a.x) + piece.offset, piece.n); });
  }
};

// The nearest value of the element type: missing lanes are filled with it, and must deviate from it by nothing.
template <class T, class C>
C representable(C value) {
  T element;
  from_compute(value, &element);
  return to_compute(element);
}

struct Sums {
  double count, deviation, squares;
};

// Sums of x - centre and of its square.
template <class T, class C>
Sums sums_around(const PlaneChunk<T, C>& chunk, C centre) {
  double count = 0, total = 0, squares = 0;
  Vec<C> t[4] = {}, q[4] = {};
  int64_t held = 0;
  const auto flush = [&] {
    total += double(sum(add_up(t)));
    squares += double(sum(add_up(q)));
    for (int slot = 0; slot < 4; ++slot) t[slot] = q[slot] = Vec<C>{};
    held = 0;
  };
  chunk.each([&](const T* x, int64_t n) {
    for (int64_t start = 0; start < n; start += kSumBlock) {
      const int64_t size = smaller(kSumBlock, n - start);
      sweep<C>(size, [&](int64_t i, int slot, auto extent) {
        fetch_ahead(x + start + i);
        const Vec<C> d = load(x + start + i, extent, splat(centre)) - centre;
        t[slot] += d;
        q[slot] += d * d;
      });
      held += size;
      if (held >= kSumBlock) flush();
    }
    count += double(n);
  });
  flush();
  return {count, total, squares};
}

// For values whose squares or sums leave the range of fp32, and for infinite ones.
template <class T, class C>
Moments moments_in_double(const PlaneChunk<T, C>& chunk) {
  double count = 0, total = 0, squares = 0;
  chunk.each([&](const T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) total += to_compute(x[i]);
    count += double(n);
  });
  const double mean = total / count;
  chunk.each([&](const T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) squares += (to_compute(x[i]) - mean) * (to_compute(x[i]) - mean);
  });
  return {mean, squares};
}

template <class T, class C>
Moments plane_moments(const PlaneChunk<T, C>& chunk) {
  const Channels& shape = chunk.a.shape;
  const int64_t pieces = chunk.a.cut.pieces, o = pieces == 1 ? chunk.first : chunk.first / pieces;
  const int64_t k = chunk.first - o * pieces;
  const Piece head = piece_of(shape, chunk.a.cut, o * shape.channels + chunk.channel, k);
  const T* x = static_cast<const T*>(chunk.a.x) + head.offset;
  const int64_t n = smaller(head.n, 4 * kLanes<C>);
  Vec<C> first[4] = {};
  sweep<C>(n, [&](int64_t i, int slot, auto extent) { first[slot] += load(x + i, extent); });
  C centre = representable<T>(sum(add_up(first)) / C(n));
  Sums s = sums_around(chunk, centre);
  double shift = s.deviation / s.count;
  if (shift * s.deviation > kPoor * s.squares) {
    centre = representable<T>(C(double(centre) + shift));
    s = sums_around(chunk, centre);
    shift = s.deviation / s.count;
  }
  if (!is_finite(double(centre) + shift) || !is_finite(s.squares)) return moments_in_double(chunk);
  const double squares = s.squares - s.deviation * shift;
  return {double(centre) + shift, squares > 0 ? squares : 0};
}

template <class T, class C>
void plane_chunk(const BatchNorm& a, int64_t channel, int64_t chunk) {
  const int64_t first = chunk * a.cut.chunk_items, last = smaller(first + a.cut.chunk_items, a.cut.items);
  const Moments m = plane_moments(PlaneChunk<T, C>{a, channel, first, last});
  double* out = a.partial + (channel * a.cut.chunks + chunk) * 2;
  out[0] = m.mean;
  out[1] = m.squares;
}

// Values of a channel's chunk of planes.
double plane_count(const BatchNorm& a, int64_t chunk) {
  const Cut& cut = a.cut;
  const int64_t first = chunk * cut.chunk_items, last = smaller(first + cut.chunk_items, cut.items);
  if (cut.pieces == 1) return double((last - first) * a.shape.inner);
  return double(smaller(cut.piece, a.shape.inner - first % cut.pieces * cut.piece));  // one piece is a chunk
}

Moments merge_plane_chunks(const BatchNorm& a, int64_t channel) {
  const double* partial = a.partial + channel * a.cut.chunks * 2;
  const double all = double(a.shape.per_channel());
  double total = 0, squares = 0;
  for (int64_t k = 0; k < a.cut.chunks; ++k) total += plane_count(a, k) * partial[2 * k];
  const double mean = total / all;
  for (int64_t k = 0; k < a.cut.chunks; ++k) {
    const double d = partial[2 * k] - mean;
    squares += partial[2 * k + 1] + plane_count(a, k) * d * d;
  }
  return {mean, squares / all};
}

// ---- rows

template <int R, class T, class C>
inline void add_rows(const T* x, int64_t width, const C* centre, C* total, C* squares) {
  sweep<C>(width, [&](int64_t i, int, auto extent) {
    const Vec<C> middle = load(centre + i, extent);
    Vec<C> t = {}, q = {};
    for (int r = 0; r < R; ++r) {
      const Vec<C> d = load(x + r * width + i, extent) - middle;
      t += d;
      q += d * d;
    }
    store(total + i, load(total + i, extent) + t, extent);
    store(squares + i, load(squares + i, extent) + q, extent);
  });
}

template <class T, class C>
void sum_rows(const T* x, int64_t rows, int64_t width, const C* centre, C* total, C* squares) {
  for (int64_t i = 0; i < width; ++i) total[i] = squares[i] = 0;
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8) add_rows<8>(x + row * width, width, centre, total, squares);
  for (; row < rows; ++row) add_rows<1>(x + row * width, width, centre, total, squares);
}

// Returns whether some column's shift was poor or its sums left the range.
template <class C>
bool finish_rows(int64_t rows, int64_t width, const C* centre, const C* total, const C* squares, double* mean,
                 double* out) {
  const double each = 1 / double(rows);
  int poor = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double shift = double(total[i]) * each, q = double(squares[i]);
    const double around = q - double(total[i]) * shift;
    mean[i] = double(centre[i]) + shift;
    out[i] = around > 0 ? around : 0;
    poor |= int(!(shift * shift <= kPoor * each * q)) | int(!is_finite(q));
  }
  return poor != 0;
}

template <class T>
void columns_in_double(const T* x, int64_t rows, int64_t width, double* mean, double* squares) {
  for (int64_t i = 0; i < width; ++i) {
    if (is_finite(mean[i]) && is_finite(squares[i])) continue;
    double total = 0, q = 0;
    for (int64_t r = 0; r < rows; ++r) total += to_compute(x[r * width + i]);
    mean[i] = total / double(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const double d = to_compute(x[r * width + i]) - mean[i];
      q += d * d;
    }
    squares[i] = q;
  }
}

template <class T, class C>
void row_chunk(const BatchNorm& a, int64_t chunk, C* buffer) {
  const int64_t width = a.cut.width, first = chunk * a.cut.chunk_rows;
  const int64_t rows = smaller(a.cut.chunk_rows, a.cut.full - first);
  const T* x = static_cast<const T*>(a.x) + first * width;
  double *mean = a.partial + chunk * 2 * width, *out = mean + width;
  if (chunk == a.cut.chunks) {  // what is left of the last wide row: each value is its own mean
    x = static_cast<const T*>(a.x) + a.cut.full * width;
    for (int64_t i = 0; i < a.cut.rest; ++i) mean[i] = to_compute(x[i]);
    return;
  }
  C *centre = buffer, *total = buffer + width, *squares = total + width;
  const int64_t head = smaller(rows, 8);
  for (int64_t i = 0; i < width; ++i) total[i] = centre[i] = 0;
  for (int64_t r = 0; r < head; ++r) add_rows<1>(x + r * width, width, centre, total, squares);
  for (int64_t i = 0; i < width; ++i) centre[i] = total[i] / C(head);
  sum_rows(x, rows, width, centre, total, squares);
  if (!finish_rows(rows, width, centre, total, squares, mean, out)) return;
  for (int64_t i = 0; i < width; ++i) centre[i] = is_finite(mean[i]) ? C(mean[i]) : C(0);
  sum_rows(x, rows, width, centre, total, squares);
  if (finish_rows(rows, width, centre, total, squares, mean, out)) columns_in_double(x, rows, width, mean, out);
}

// Calls f(count, partial) for each set of statistics that channels [begin, ...) have, in order: count says how many
// values each stands for.
template <class F>
void each_row_partial(const BatchNorm& a, int64_t begin, F&& f) {
  const Cut& cut = a.cut;
  const int64_t channels = a.shape.channels;
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    const double count = double(smaller(cut.chunk_rows, cut.full - chunk * cut.chunk_rows));
    for (int64_t copy = 0; copy < cut.width; copy += channels) {
      f(count, a.partial + chunk * 2 * cut.width + copy + begin, cut.width);
    }
  }
  for (int64_t copy = 0; copy < cut.rest; copy += channels) {
    f(1.0, a.partial + cut.chunks * 2 * cut.width + copy + begin, int64_t(0));
  }
}

void merge_rows(const BatchNorm& a, int64_t begin, int64_t n, double* mean, double* var) {
  const double all = double(a.shape.per_channel());
  for (int64_t i = 0; i < n; ++i) mean[i] = var[i] = 0;
  each_row_partial(a, begin, [&](double count, const double* partial, int64_t) {
    for (int64_t i = 0; i < n; ++i) mean[i] += count * partial[i];
  });
  for (int64_t i = 0; i < n; ++i) mean[i] /= all;
  each_row_partial(a, begin, [&](double count, const double* partial, int64_t squares) {
    for (int64_t i = 0; i < n; ++i) {
      const double d = partial[i] - mean[i];
      var[i] += count * d * d + (squares > 0 ? partial[squares + i] : 0.0);
    }
  });
  for (int64_t i = 0; i < n; ++i) var[i] /= all;
}

// ---- coefficients

template <class C>
void write_coefficients(const BatchNorm& a, int64_t begin, int64_t n, const double* mean, const double* var) {
  double weight[kBlock], bias[kBlock];
  widen_parameter(a.weight, 1.0, weight, begin, n);
  widen_parameter(a.bias, 0.0, bias, begin, n);
  C* table = static_cast<C*>(a.coefficients);
  const int64_t width = a.cut.width, channels = a.shape.channels;
  for (int64_t i = 0; i < n; ++i) {
    if (a.out_mean != nullptr) {
      static_cast<C*>(a.out_mean)[begin + i] = C(mean[i]);
      static_cast<C*>(a.out_var)[begin + i] = C(var[i]);
    }
    if (table == nullptr) continue;
    const double scale = weight[i] / __builtin_sqrt(var[i] + a.eps);
    const C high = C(mean[i]);
    const double rest = mean[i] - double(high);  // what rounding took from the mean
    spread(table, width, channels, begin + i, high);
    spread(table + width, width, channels, begin + i, C(scale));
    spread(table + 2 * width, width, channels, begin + i, C(bias[i] - (is_finite(rest) ? rest * scale : 0.0)));
  }
}

}  // namespace

void batch_norm_plane_stats(const BatchNorm& a, int64_t begin, int64_t end) {
  int64_t channel = begin / a.cut.chunks, chunk = begin - channel * a.cut.chunks;
  for (int64_t i = begin; i < end; ++i) {
    PYDL_FLOAT_SWITCH(a.dtype, plane_chunk<T, compute_t<T>>(a, channel, chunk));
    if (++chunk == a.cut.chunks) chunk = 0, ++channel;
  }
}

// Statistics of chunks of rows; the buffer holds three wide rows of the compute type.
void batch_norm_row_stats(const BatchNorm& a, void* buffer, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    PYDL_FLOAT_SWITCH(a.dtype, row_chunk<T>(a, chunk, static_cast<compute_t<T>*>(buffer)));
  }
}

void batch_norm_merge(const BatchNorm& a, int64_t begin, int64_t end) {
  double mean[kBlock], var[kBlock];
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t n = smaller(kBlock, end - c);
    if (a.out_mean == nullptr) {
      widen_parameter(a.mean, 0.0, mean, c, n);
      widen_parameter(a.var, 1.0, var, c, n);
    } else if (a.shape.rows()) {
      merge_rows(a, c, n, mean, var);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const Moments m = merge_plane_chunks(a, c + i);
        mean[i] = m.mean;
        var[i] = m.squares;
      }
    }
    PYDL_FLOAT_SWITCH(a.dtype, write_coefficients<compute_t<T>>(a, c, n, mean, var));
  }
}

}  // namespace pydl::PYDL_ISA
