// What the CPU files of local response normalisation share: arguments, the power, and sums over windows of channels.
#pragma once

#include "common/response_norm.h"
#include "common/vec_math.h"

namespace pydl {

// A tile is `cols` neighbouring elements of the planes, in `rows` neighbouring channels. Sums belong to one element, so
// their bits do not depend on tiles.
struct LrnArgs {
  ResponseNorm norm;
  const void* x;
  const void* dy;  // backward only
  void* out;       // y, or dx
  Dtype dtype;
  int64_t cols = 0, rows = 0, col_tiles = 0, row_tiles = 0;
  int64_t padded = 0;  // elements of a row of channels in a buffer, with the window's reach and what whole vectors read
};

namespace PYDL_ISA {
namespace {

// One tile: elements [0, cols) of channels [first, last) from `base` on.
struct LrnTile {
  LrnTile(const LrnArgs& a, int64_t item) {
    const Channels& s = a.norm.shape;
    const int64_t strip = item % a.col_tiles, band = item / a.col_tiles % a.row_tiles;
    const int64_t outer = item / (a.col_tiles * a.row_tiles);
    base = outer * s.channels * s.inner + strip * a.cols;
    cols = smaller(a.cols, s.inner - strip * a.cols);
    first = band * a.rows;
    last = smaller(first + a.rows, s.channels);
  }
  int64_t base, cols, first, last;
};

// sum^-beta of a sum of squares.
template <bool ROOTS, class C>
struct Denominator {
  explicit Denominator(const ResponseNorm& norm) : scale(C(norm.scale)), k(C(norm.k)), power(-norm.beta) {}
  Vec<C> base(Vec<C> squares) const { return squares * scale + k; }
  Vec<C> factor(Vec<C> base) const {
    if constexpr (ROOTS) {
      return power_minus_three_quarters(base);
    } else {
      return power(base);
    }
  }
  C scale, k;
  Power<C> power;
};

// Calls f(i, U, extent) for groups of U = 4 vectors, then single ones.
template <class C, class F>
inline __attribute__((always_inline)) void groups(int64_t n, F&& f) {
  constexpr int L = kLanes<C>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) f.template operator()<4>(i, Whole{});
  for (; i + L <= n; i += L) f.template operator()<1>(i, Whole{});
  if (i < n) f.template operator()<1>(i, Part{n - i});
}

// Sum of p[i], p[i + 1], ... over the window, for U vectors of i.
template <int U, class C>
inline void sum_window(const C* p, int64_t window, Vec<C> (&total)[U]) {
  for (int u = 0; u < U; ++u) total[u] = load(p + u * kLanes<C>);
  for (int64_t j = 1; j < window; ++j) {
    for (int u = 0; u < U; ++u) total[u] += load(p + j + u * kLanes<C>);
  }
}

// Sum of squares over `count` channels of planes, for U vectors.
template <int U, class T, class Extent>
inline void sum_squares(const T* x, int64_t count, int64_t stride, Extent extent, Vec<compute_t<T>> (&total)[U]) {
  using C = compute_t<T>;
  for (int u = 0; u < U; ++u) total[u] = Vec<C>{};
  for (int64_t j = 0; j < count; ++j) {
    for (int u = 0; u < U; ++u) {
      const Vec<C> v = load(x + j * stride + u * kLanes<C>, extent);
      total[u] += v * v;
    }
  }
}

// One row of channels, squared, between zeros.
template <class T, class C>
inline void square_row(const T* x, int64_t n, C* out) {
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> v = load(x + i, extent);
    store(out + i, v * v, extent);
  });
}

template <class C>
inline void clear(C* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

// Runs the statement with T bound to the dtype and ROOTS telling whether beta is 0.75.
#define PYDL_LRN_SWITCH(args, ...)                \
  if ((args).norm.beta == 0.75) {                 \
    constexpr bool ROOTS = true;                  \
    PYDL_FLOAT_SWITCH((args).dtype, __VA_ARGS__); \
  } else {                                        \
    constexpr bool ROOTS = false;                 \
    PYDL_FLOAT_SWITCH((args).dtype, __VA_ARGS__); \
  }

#if PYDL_ISA_LEVEL == 0

namespace pydl {
namespace {

inline void choose_lrn_tile(LrnArgs& a) {
  const Channels& s = a.norm.shape;
  const int64_t window = a.norm.window;
  a.cols = std::min<int64_t>(s.inner, window <= 16 ? 1024 : window <= 128 ? 256 : 64);
  a.rows = std::min(s.channels, std::max<int64_t>(64, 4 * window));
  a.col_tiles = (s.inner + a.cols - 1) / a.cols;
  a.row_tiles = (s.channels + a.rows - 1) / a.rows;
  a.padded = s.channels + window + 64;
}

}  // namespace
}  // namespace pydl

#endif
