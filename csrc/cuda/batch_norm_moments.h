// Means and squared deviations that are merged (Chan, Golub, LeVeque, "Algorithms for computing the sample variance",
// 1983), for the kernels of batch and group statistics.
#pragma once

#include "cuda/batch_norm.h"

namespace pydl {
namespace {

template <typename A>
struct Moments {
  A n, mean, m2;
};

template <typename A>
__device__ __forceinline__ Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  if (b.n == A(0)) return a;
  if (a.n == A(0)) return b;
  A n = a.n + b.n, delta = b.mean - a.mean, share = b.n / n;
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.n * share};
}

template <int K, typename A>
__device__ __forceinline__ Moments<A> moments_of(const A (&values)[K], A shift) {
  A sum = 0, m2 = 0;
#pragma unroll
  for (int i = 0; i < K; ++i) sum += values[i] - shift;
  A mean = sum * (A(1) / A(K));
#pragma unroll
  for (int i = 0; i < K; ++i) {
    A d = (values[i] - shift) - mean;
    m2 += d * d;
  }
  return {A(K), mean, m2};
}

// Lane 0 gets all lanes merged, neighbours first.
template <typename A>
__device__ Moments<A> warp_merge(Moments<A> m) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    Moments<A> other{__shfl_down_sync(kFullMask, m.n, offset), __shfl_down_sync(kFullMask, m.mean, offset),
                     __shfl_down_sync(kFullMask, m.m2, offset)};
    m = merge(m, other);
  }
  return m;
}

template <typename A>
__device__ void write_final(const NormFinal& f, int64_t c, int64_t channels, A shift, const Moments<A>& m) {
  A mean = shift + m.mean, var = m.m2 / m.n;
  if (f.mean != nullptr) {
    static_cast<A*>(f.mean)[c] = mean;
    static_cast<A*>(f.var)[c] = var;
  }
  if (f.table == nullptr) return;
  // what rounding took from the mean (Knuth's two-sum)
  A part = mean - shift, rest = (shift - (mean - part)) + (m.mean - part);
  A scale = read_parameter(f.weight, c, A(1)) / A(sqrt(var + A(f.eps)));
  A* table = static_cast<A*>(f.table);
  table[c] = mean;
  table[channels + c] = scale;
  table[2 * channels + c] = read_parameter(f.bias, c, A(0)) - rest * scale;
}

// R rows at once join V running means.
template <int R, int V, typename T, typename A>
__device__ __forceinline__ void join_rows(const T* x, int64_t stride, const A (&shift)[V], A& n, A (&mean)[V],
                                          A (&m2)[V]) {
  A values[R][V];
#pragma unroll
  for (int r = 0; r < R; ++r) load_values<V>(x + r * stride, values[r]);
  A before = n, share = A(R) / (n + A(R));
  n += A(R);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A column[R];
#pragma unroll
    for (int r = 0; r < R; ++r) column[r] = values[r][j];
    Moments<A> m = moments_of(column, shift[j]);
    A delta = m.mean - mean[j];
    mean[j] += delta * share;
    m2[j] += m.m2 + delta * delta * before * share;
  }
}

}  // namespace
}  // namespace pydl
