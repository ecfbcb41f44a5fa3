// One bit per element beside SIMD values: bit i % 8 of byte i / 8 belongs to element i. For CPU kernels.
#pragma once

#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

// The truth values of a mask as bits, lane 0 lowest.
template <class C>
inline uint32_t bits_of(Mask<C> mask) {
#if PYDL_VEC_BYTES == 64
  return uint32_t(mask);
#elif PYDL_VEC_BYTES == 32
  if constexpr (sizeof(C) == 4) return uint32_t(_mm256_movemask_ps((__m256)mask));
  if constexpr (sizeof(C) == 8) return uint32_t(_mm256_movemask_pd((__m256d)mask));
#elif defined(__x86_64__)
  if constexpr (sizeof(C) == 4) return uint32_t(_mm_movemask_ps((__m128)mask));
  if constexpr (sizeof(C) == 8) return uint32_t(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<C>; ++i) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
#endif
}

template <class C>
inline Mask<C> mask_of(uint32_t bits) {
#if PYDL_VEC_BYTES == 64
  return Mask<C>(bits);
#else
  IntVec<C> lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = int_t<C>(1) << i;
  return (splat(int_t<C>(bits)) & lane) == lane;
#endif
}

// How many elements of a vector exist.
template <class C>
inline int64_t extent_size(Whole) {
  return kLanes<C>;
}
template <class C>
inline int64_t extent_size(Part part) {
  return part.n;
}

// The bits of a vector that begins at element i, a multiple of its lanes. Vectors of fewer than 8 lanes share a byte:
// they must be stored in ascending order, and by one thread.
template <class C, class Extent>
inline uint32_t load_bits(const uint8_t* p, int64_t i, Extent extent) {
  if constexpr (kLanes<C> < 8) {
    return uint32_t(p[i / 8]) >> (i % 8);
  } else {
    uint32_t bits = p[i / 8];
    if (kLanes<C> > 8 && extent_size<C>(extent) > 8) bits |= uint32_t(p[i / 8 + 1]) << 8;
    return bits;
  }
}
template <class C, class Extent>
inline void store_bits(uint8_t* p, int64_t i, uint32_t bits, Extent extent) {
  if constexpr (kLanes<C> < 8) {
    const uint32_t before = i % 8 == 0 ? 0 : p[i / 8];
    p[i / 8] = uint8_t(before | bits << (i % 8));
  } else {
    p[i / 8] = uint8_t(bits);
    if (kLanes<C> > 8 && extent_size<C>(extent) > 8) p[i / 8 + 1] = uint8_t(bits >> 8);
  }
}

}  // namespace
}  // namespace pydl::PYDL_ISA
