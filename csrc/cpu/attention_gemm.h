// c += a b for tiles that fit the caches. Elements of a are read one at a time, at any two strides, so that a may be
// transposed; rows of b and c are whole vectors. A block of 6 rows by NR vectors of c stays in registers.
#pragma once

#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

inline constexpr int kBlockVectors = PYDL_VEC_BYTES == 64 ? 4 : 2;

template <class C>
struct Gemm {
  const C* a;
  int64_t a_row, a_column;
  const C* b;
  int64_t b_row;
  C* c;
  int64_t c_row;
  int64_t depth;
  bool add;  // to c, instead of writing it
};

template <int MR, int NR, class C>
inline void gemm_block(const Gemm<C>& g, const C* a, const C* b, C* c) {
  constexpr int L = kLanes<C>;
  Vec<C> sums[MR][NR] = {};
  for (int64_t k = 0; k < g.depth; ++k) {
    Vec<C> row[NR];
    for (int n = 0; n < NR; ++n) row[n] = load(b + k * g.b_row + n * L);
    for (int m = 0; m < MR; ++m) {
      const C value = a[m * g.a_row + k * g.a_column];
      for (int n = 0; n < NR; ++n) sums[m][n] += value * row[n];
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) {
      C* at = c + m * g.c_row + n * L;
      store(at, g.add ? load(at) + sums[m][n] : sums[m][n]);
    }
  }
}

template <int NR, class C>
inline void gemm_columns(const Gemm<C>& g, int64_t rows, int64_t column) {
  const C* b = g.b + column;
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) gemm_block<6, NR>(g, g.a + m * g.a_row, b, g.c + m * g.c_row + column);
  const C* a = g.a + m * g.a_row;
  C* c = g.c + m * g.c_row + column;
  switch (rows - m) {
    case 5:
      return gemm_block<5, NR>(g, a, b, c);
    case 4:
      return gemm_block<4, NR>(g, a, b, c);
    case 3:
      return gemm_block<3, NR>(g, a, b, c);
    case 2:
      return gemm_block<2, NR>(g, a, b, c);
    case 1:
      return gemm_block<1, NR>(g, a, b, c);
    default:
      return;
  }
}

// `columns` is a multiple of the vector length.
template <class C>
void gemm(const Gemm<C>& g, int64_t rows, int64_t columns) {
  constexpr int64_t block = kBlockVectors * kLanes<C>;
  int64_t n = 0;
  for (; n + block <= columns; n += block) gemm_columns<kBlockVectors>(g, rows, n);
  for (; n < columns; n += kLanes<C>) gemm_columns<1>(g, rows, n);
}

}  // namespace
}  // namespace pydl::PYDL_ISA
