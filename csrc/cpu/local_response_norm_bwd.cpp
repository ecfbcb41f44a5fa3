// Local response normalisation, backward. With s the sum under the power and r = dy x s^(-beta - 1), the derivative of
// y_c = x_c s_c^-beta, gathered over the windows that hold channel i, is
//   dx_i = dy_i s_i^-beta - 2 alpha beta / size * x_i * sum over c in [i - after, i + before] of r_c.
// s is found again from x: reading it would cost as much as the sum. Planes keep r and s^-beta of the channels that are
// still needed in a ring of rows.

#include "cpu/local_response_norm.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

// s^-beta and r of U vectors.
template <int U, bool ROOTS, class T, class C, class Extent>
inline void put_terms(const Denominator<ROOTS, C>& denominator, const Vec<C> (&squares)[U], const T* x, const T* dy,
                      C* factor, C* r, Extent extent) {
  for (int u = 0; u < U; ++u) {
    const int at = u * kLanes<C>;
    const Vec<C> base = denominator.base(squares[u]), z = denominator.factor(base);
    store(factor + at, z, extent);
    store(r + at, load(dy + at, extent) * load(x + at, extent) * (z / base), extent);
  }
}

template <int U, class T, class C, class Extent>
inline void put_dx(const Vec<C> (&total)[U], C slope, const T* x, const T* dy, const C* factor, T* dx, Extent extent) {
  for (int u = 0; u < U; ++u) {
    const int at = u * kLanes<C>;
    const Vec<C> own = load(dy + at, extent) * load(factor + at, extent);
    store(dx + at, own - load(x + at, extent) * slope * total[u], extent);
  }
}

template <class C>
inline C slope_of(const ResponseNorm& norm) {
  return C(2 * norm.scale * norm.beta);
}

template <bool ROOTS, class T, class C>
void bwd_tile(const LrnArgs& a, const LrnTile& t, const Denominator<ROOTS, C>& denominator, C* ring) {
  const ResponseNorm& norm = a.norm;
  const int64_t stride = norm.shape.inner, channels = norm.shape.channels, window = norm.window;
  const int64_t kept = norm.before + 1;
  C* factors = ring + window * a.cols;
  const T *x = static_cast<const T*>(a.x) + t.base, *dy = static_cast<const T*>(a.dy) + t.base;
  T* dx = static_cast<T*>(a.out) + t.base;
  const C slope = slope_of<C>(norm);
  for (int64_t c = larger(0, t.first - norm.after); c < t.last + norm.before; ++c) {
    if (c < channels) {
      const int64_t low = larger(0, c - norm.before), high = smaller(channels, c + norm.after + 1);
      C *r = ring + c % window * a.cols, *factor = factors + c % kept * a.cols;
      groups<C>(t.cols, [&]<int U>(int64_t i, auto extent) {
        Vec<C> squares[U];
        sum_squares<U>(x + low * stride + i, high - low, stride, extent, squares);
        put_terms<U>(denominator, squares, x + c * stride + i, dy + c * stride + i, factor + i, r + i, extent);
      });
    }
    const int64_t own = c - norm.before;
    if (own < t.first) continue;
    const int64_t low = larger(0, own - norm.after), high = smaller(channels, own + norm.before + 1);
    const C* factor = factors + own % kept * a.cols;
    groups<C>(t.cols, [&]<int U>(int64_t i, auto extent) {
      Vec<C> total[U] = {};
      int64_t slot = low % window;
      for (int64_t j = low; j < high; ++j, slot = slot + 1 == window ? 0 : slot + 1) {
        for (int u = 0; u < U; ++u) total[u] += load(ring + slot * a.cols + i + u * kLanes<C>, extent);
      }
      const int64_t at = own * stride + i;
      put_dx<U>(total, slope, x + at, dy + at, factor + i, dx + at, extent);
    });
  }
}

template <bool ROOTS, class T, class C>
void bwd_tiles(const LrnArgs& a, C* ring, int64_t begin, int64_t end) {
  const Denominator<ROOTS, C> denominator(a.norm);
  for (int64_t item = begin; item < end; ++item) bwd_tile<ROOTS, T>(a, LrnTile(a, item), denominator, ring);
}

template <bool ROOTS, class T, class C>
void bwd_rows(const LrnArgs& a, C* buffer, int64_t begin, int64_t end) {
  const ResponseNorm& norm = a.norm;
  const int64_t n = norm.shape.channels, window = norm.window, padded = a.padded;
  const Denominator<ROOTS, C> denominator(norm);
  const C slope = slope_of<C>(norm);
  C *squares = buffer, *r = squares + padded, *factor = r + padded;
  clear(buffer, 3 * padded);
  for (int64_t row = begin; row < end; ++row) {
    const T *x = static_cast<const T*>(a.x) + row * n, *dy = static_cast<const T*>(a.dy) + row * n;
    T* dx = static_cast<T*>(a.out) + row * n;
    square_row(x, n, squares + norm.before);
    groups<C>(n, [&]<int U>(int64_t i, auto extent) {
      Vec<C> total[U];
      sum_window<U>(squares + i, window, total);
      put_terms<U>(denominator, total, x + i, dy + i, factor + i, r + norm.after + i, extent);
    });
    groups<C>(n, [&]<int U>(int64_t i, auto extent) {
      Vec<C> total[U];
      sum_window<U>(r + i, window, total);
      put_dx<U>(total, slope, x + i, dy + i, factor + i, dx + i, extent);
    });
  }
}

}  // namespace

// Tiles [begin, end) of planes; `ring` holds window + before + 1 rows of a tile in the compute type.
void lrn_bwd_tiles(const LrnArgs& a, void* ring, int64_t begin, int64_t end) {
  PYDL_LRN_SWITCH(a, bwd_tiles<ROOTS, T>(a, static_cast<compute_t<T>*>(ring), begin, end));
}

// Rows [begin, end) of channels; `buffer` holds three padded rows of the compute type.
void lrn_bwd_rows(const LrnArgs& a, void* buffer, int64_t begin, int64_t end) {
  PYDL_LRN_SWITCH(a, bwd_rows<ROOTS, T>(a, static_cast<compute_t<T>*>(buffer), begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, lrn_bwd_tiles, const LrnArgs&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, lrn_bwd_rows, const LrnArgs&, void*, int64_t, int64_t)

namespace {

Tensor local_response_norm_bwd(const Tensor& dy, const Tensor& x, int64_t size, double alpha, double beta, double k) {
  const char* const op = "local_response_norm_bwd";
  const Array meta(x);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const Layout layout(op, meta);
  const Dense in = layout.dense_in(op, "x", x, meta, meta.dtype), grad = layout.dense_in(op, "dy", dy, meta.dtype);
  Output dx = host::empty_strided(layout.sizes, layout.strides, layout.dim, meta.dtype);
  LrnArgs args{response_norm(op, layout, size, alpha, beta, k), in.data, grad.data, dx.data, meta.dtype};
  const Channels& s = args.norm.shape;
  if (s.numel() == 0) return std::move(dx.tensor);
  choose_lrn_tile(args);
  const int64_t element = host::size_of(host::compute_dtype(meta.dtype)), work = 2 * args.norm.window;
  if (s.rows()) {
    host::parallel(s.outer, s.channels * work, [&](int64_t begin, int64_t end) {
      const host::Scratch buffer(3 * args.padded * element);
      PYDL_CPU_DISPATCH(lrn_bwd_rows)(args, buffer.get(), begin, end);
    });
  } else {
    const int64_t rows = args.norm.window + args.norm.before + 1;
    host::parallel(s.outer * args.col_tiles * args.row_tiles, args.cols * args.rows * work,
                   [&](int64_t begin, int64_t end) {
                     const host::Scratch ring(rows * args.cols * element);
                     PYDL_CPU_DISPATCH(lrn_bwd_tiles)(args, ring.get(), begin, end);
                   });
  }
  return std::move(dx.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("local_response_norm_bwd", TORCH_BOX(&local_response_norm_bwd)); }

}  // namespace
}  // namespace pydl

#endif
