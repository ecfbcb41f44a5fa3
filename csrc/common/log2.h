// Base-2 exponentials and logarithms, and sums of numbers that are held as their base-2 logarithms.
#pragma once

#include "common/device.h"

namespace pydl {

// One instruction each in float, with subnormals as 0: log2_fast is off by at most 2^-22 (absolute in [0.5, 2],
// relative elsewhere), exp2_fast by 2 ulp. log2f and exp2f cost several times that. double is the library's.
#ifdef PYDL_SIMT

__device__ inline float exp2_fast(float x) { return std::exp2(x); }
__device__ inline float log2_fast(float x) { return std::log2(x); }

#else

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

__device__ inline double exp2_fast(double x) { return exp2(x); }
__device__ inline double log2_fast(double x) { return log2(x); }

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// log2(2^a + 2^b). Equal terms are taken apart, so that -inf and -inf give -inf; a NaN gives NaN.
template <typename A>
__device__ __forceinline__ A log2_add(A a, A b) {
  A distance = a == b ? A(0) : -fabs(a - b);
  return max(a, b) + log2_fast(A(1) + exp2_fast(distance));
}

// log2(2^a + 2^b + 2^c) in a shorter chain of dependent instructions than two calls of the above.
template <typename A>
__device__ __forceinline__ A log2_add(A a, A b, A c) {
  A top = max(max(a, b), c);
  A reference = top == A(-INFINITY) ? A(0) : top;
  return reference + log2_fast(exp2_fast(a - reference) + exp2_fast(b - reference) + exp2_fast(c - reference));
}

}  // namespace pydl
