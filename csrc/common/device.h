// The device language: CUDA's headers under nvcc, the SIMT host runner's otherwise. Every kernel header starts here.
#pragma once

#ifdef PYDL_SIMT
#include "pydl_simt/atomics.h"
#include "pydl_simt/half.h"
#include "pydl_simt/math.h"
#include "pydl_simt/runtime.h"
#include "pydl_simt/warp.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace pydl {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The type a dtype is accumulated in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

__host__ __device__ inline float to_acc(float x) { return x; }
__host__ __device__ inline double to_acc(double x) { return x; }
__host__ __device__ inline float to_acc(__half x) { return __half2float(x); }
__host__ __device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <typename T>
__host__ __device__ T from_acc(acc_t<T> x);
template <>
__host__ __device__ inline float from_acc<float>(float x) {
  return x;
}
template <>
__host__ __device__ inline double from_acc<double>(double x) {
  return x;
}
template <>
__host__ __device__ inline __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ inline __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace pydl
