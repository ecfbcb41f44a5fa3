// CUDA's qualifiers and built-in vector types for the host compiler.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

// __shared__ stays undefined on purpose: shared memory goes through PYDL_SHARED and PYDL_DYN_SHARED.

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define PYDL_SIMT_VECTOR(type, name)                                                     \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
  struct name##3 { type x, y, z; };                                                      \
  struct alignas(sizeof(type) < 4 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

PYDL_SIMT_VECTOR(unsigned, uint)
PYDL_SIMT_VECTOR(signed char, char)
PYDL_SIMT_VECTOR(unsigned char, uchar)
PYDL_SIMT_VECTOR(short, short)
PYDL_SIMT_VECTOR(unsigned short, ushort)
PYDL_SIMT_VECTOR(int, int)
PYDL_SIMT_VECTOR(long long, longlong)
PYDL_SIMT_VECTOR(unsigned long long, ulonglong)
PYDL_SIMT_VECTOR(float, float)
PYDL_SIMT_VECTOR(double, double)
#undef PYDL_SIMT_VECTOR

using cudaStream_t = void*;
