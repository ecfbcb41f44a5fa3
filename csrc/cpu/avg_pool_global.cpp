// Mean pooling over whole planes, contiguous layout: one sum, or in the backward one value, for each.

#include "cpu/avg_pool.h"

namespace pydl::PYDL_ISA {
namespace {

// The sums of N vectors, N a power of two: lane i of every 2nd, 4th, ... is of vector i. All N lanes with N = L.
template <int N, class V>
inline V sums_of(const V* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    const V a = sums_of<N / 2>(v), b = sums_of<N / 2>(v + N / 2);
    return even(a, b) + odd(a, b);
  }
}

// The same as load(p), without a load that crosses a cache line where p is aligned to half a line only.
template <class T>
inline Vec<compute_t<T>> load_by_halves(const T* p) {
#if PYDL_VEC_BYTES == 64
  if constexpr (sizeof(T) >= 4) {
    const __m512d low = _mm512_castpd256_pd512(_mm256_loadu_pd(reinterpret_cast<const double*>(p)));
    const __m256d high = _mm256_loadu_pd(reinterpret_cast<const double*>(reinterpret_cast<const char*>(p) + 32));
    return (Vec<T>)_mm512_insertf64x4(low, high, 1);
  }
#endif
  return load(p);
}

template <bool HALVES, class T, class C>
inline Vec<C> sum_lanes(const T* x, int64_t n) {
  constexpr int64_t kAhead = 2048 / sizeof(T);  // planes are read on end, but the prefetcher stops at each page
  Vec<C> parts[4] = {};
  sweep<C>(n, [&](int64_t i, int slot, auto extent) {
    __builtin_prefetch(x + i + kAhead);
    if constexpr (HALVES && is_same<decltype(extent), Whole>) {
      parts[slot] += load_by_halves(x + i);
    } else {
      parts[slot] += load(x + i, extent);
    }
  });
  return add_up(parts);
}

// As many planes as a vector has lanes, or fewer: what is added to what does not depend on a plane's neighbours.
template <class T, class C, class Extent>
inline void mean_planes(const T* x, int64_t n, C divisor, int64_t count, T* y, Extent extent) {
  constexpr int L = kLanes<C>;
  Vec<C> sums[L] = {};
  for (int64_t plane = 0; plane < count; ++plane, x += n) {
    sums[plane] =
        reinterpret_cast<uintptr_t>(x) % 64 == 32 ? sum_lanes<true, T, C>(x, n) : sum_lanes<false, T, C>(x, n);
  }
  store(y, sums_of<L>(sums) / splat(divisor), extent);
}

template <class T, class C>
C long_mean(const T* x, int64_t n, int64_t block, C divisor) {
  double total = 0;
  for (int64_t from = 0; from < n; from += block) {
    total += double(sum(sum_lanes<false, T, C>(x + from, smaller(block, n - from))));
  }
  return C(total) / divisor;
}

template <class T, class C>
void whole_planes(const PoolMean& a, bool forward, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t n = s.d.in * s.h.in * s.w.in;
  constexpr int64_t kBlock = 4096;  // summed in C, before they are added up in double
  constexpr int L = kLanes<C>;
  const C divisor = depth_share<C>(a, 0) * share<C>(a, s.h, 0) * share<C>(a, s.w, 0);
  const T* from = static_cast<const T*>(a.from);
  T* to = static_cast<T*>(a.to);
  int64_t plane = begin;
  if (!forward) {
    for (; plane < end; ++plane) {
      const Vec<C> value = splat(to_compute(from[plane]) / divisor);
      sweep<C>(n, [&](int64_t i, int, auto extent) { store(to + plane * n + i, value, extent); });
    }
  } else if (n > kBlock) {
    for (; plane < end; ++plane) from_compute(long_mean<T, C>(from + plane * n, n, kBlock, divisor), to + plane);
  } else {
    for (; plane + L <= end; plane += L) mean_planes<T, C>(from + plane * n, n, divisor, L, to + plane, Whole{});
    const int64_t rest = end - plane;
    if (rest > 0) mean_planes<T, C>(from + plane * n, n, divisor, rest, to + plane, Part{rest});
  }
}

}  // namespace

// Planes [begin, end).
void avg_pool_planes(const PoolMean& a, bool forward, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, whole_planes<T, compute_t<T>>(a, forward, begin, end));
}

}  // namespace pydl::PYDL_ISA
