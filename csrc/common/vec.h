// SIMD values for CPU kernels, on the compiler's vector extensions: 64, 32 or 16 bytes by the level a file is compiled
// at. Arithmetic is the operators; this header adds loads and stores (whole and partial, converting fp16 and bf16 to
// fp32 and back with round to nearest even), comparison masks, maximum, sums and even/odd selection.
//
// Everything has internal linkage, so that the linker can never pick an AVX-512 copy for a baseline caller. For the
// same reason kernels use no function of the standard library.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define PYDL_VEC_BYTES 64
#elif defined(__AVX2__) && defined(__F16C__)
#define PYDL_VEC_BYTES 32
#else
#define PYDL_VEC_BYTES 16
#endif

namespace pydl::PYDL_ISA {
namespace {

template <class T, int N>
struct VecType {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using VecN = typename VecType<T, N>::type;

template <class C>
inline constexpr int kLanes = PYDL_VEC_BYTES / sizeof(C);
template <class C>
using Vec = VecN<C, kLanes<C>>;

using VecF = Vec<float>;
using VecD = Vec<double>;

// The integer as wide as C, and a vector of as many of them as Vec<C> has lanes.
template <class C>
struct IntType {
  using type = int32_t;
};
template <>
struct IntType<double> {
  using type = int64_t;
};
template <class C>
using int_t = typename IntType<C>::type;
template <class C>
using IntVec = Vec<int_t<C>>;

template <class V>
using lane_t = decltype(V{}[0] + V{}[0]);
template <class V>
inline constexpr int kLanesOf = sizeof(V) / sizeof(V{}[0]);

// A subtraction of 0 leaves every value as it is, -0 too, so that no instruction is spent on it.
template <class C>
inline Vec<C> splat(C value) {
  return value - Vec<C>{};
}

template <class C>
inline constexpr C kInfinity = C(__builtin_inf());

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// Quotients rounded down and up, b > 0.
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// ---- scalar conversions

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }
inline float to_compute(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
inline float to_compute(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude << 13));
  // The exponent's bias grows by 112; a multiplication does so for subnormal numbers too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void from_compute(float value, float* out) { *out = value; }
inline void from_compute(double value, double* out) { *out = value; }
inline void from_compute(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  out->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_compute(float value, Half* out) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520, the first value that rounds to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal in fp16: a sum with 0.5 rounds to multiples of 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

// ---- memory

// How many lanes of a vector exist in memory: all of them, or the first n.
struct Whole {};
struct Part {
  int64_t n;
};

template <class V>
inline V load_raw(const void* p, Whole, V) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store_raw(void* p, V v, Whole) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Lanes past the end are taken from `fill`. Memory past the end is not touched.
template <class V>
inline V load_raw(const void* p, Part part, V fill) {
#if PYDL_VEC_BYTES == 64
  constexpr int size = sizeof(V{}[0]);
  const uint64_t lanes = (uint64_t(1) << part.n) - 1;
  if constexpr (sizeof(V) == 64 && size == 4) {
    return (V)_mm512_mask_loadu_epi32((__m512i)fill, __mmask16(lanes), p);
  } else if constexpr (sizeof(V) == 64 && size == 8) {
    return (V)_mm512_mask_loadu_epi64((__m512i)fill, __mmask8(lanes), p);
  } else if constexpr (sizeof(V) == 16 && size == 1) {
    return (V)_mm_mask_loadu_epi8((__m128i)fill, __mmask16(lanes), p);
  } else if constexpr (sizeof(V) == 32 && size == 2) {
    return (V)_mm256_mask_loadu_epi16((__m256i)fill, __mmask16(lanes), p);
  } else
#endif
  {
    __builtin_memcpy(&fill, p, size_t(part.n) * sizeof(V{}[0]));
    return fill;
  }
}
template <class V>
inline void store_raw(void* p, V v, Part part) {
#if PYDL_VEC_BYTES == 64
  constexpr int size = sizeof(V{}[0]);
  const uint64_t lanes = (uint64_t(1) << part.n) - 1;
  if constexpr (sizeof(V) == 64 && size == 4) {
    _mm512_mask_storeu_epi32(p, __mmask16(lanes), (__m512i)v);
  } else if constexpr (sizeof(V) == 64 && size == 8) {
    _mm512_mask_storeu_epi64(p, __mmask8(lanes), (__m512i)v);
  } else if constexpr (sizeof(V) == 32 && size == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(lanes), (__m256i)v);
  } else if constexpr (sizeof(V) == 16 && size == 1) {
    _mm_mask_storeu_epi8(p, __mmask16(lanes), (__m128i)v);
  } else
#endif
    __builtin_memcpy(p, &v, size_t(part.n) * sizeof(V{}[0]));
}

// The AVX-512 intrinsics without a mask make g++ 12 warn of uninitialised values; with a full mask the code is the
// same.
using Bits16 = VecN<uint16_t, kLanes<float>>;  // as many 16-bit elements as fp32 lanes
using Bits32 = Vec<uint32_t>;

inline VecF widen(Bits16 bits, BFloat16) { return (VecF)(__builtin_convertvector(bits, Bits32) << 16); }
inline VecF widen(Bits16 bits, Half) {
#if PYDL_VEC_BYTES == 64
  return (VecF)_mm512_maskz_cvtph_ps(-1, (__m256i)bits);
#elif PYDL_VEC_BYTES == 32
  return (VecF)_mm256_cvtph_ps((__m128i)bits);
#else
  VecF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_compute(Half{bits[i]});
  return v;
#endif
}

inline Bits16 narrow(VecF v, BFloat16) {
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 is_number = (Bits32)(v == v);
  return __builtin_convertvector((rounded & is_number) | (0x7fc0 & ~is_number), Bits16);
}
inline Bits16 narrow(VecF v, Half) {
#if PYDL_VEC_BYTES == 64
  return (Bits16)_mm512_maskz_cvtps_ph(-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PYDL_VEC_BYTES == 32
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Bits16 bits;
  for (int i = 0; i < kLanes<float>; ++i) {
    Half half;
    from_compute(v[i], &half);
    bits[i] = half.bits;
  }
  return bits;
#endif
}

// load(p, extent): a vector of compute_t<T>; with a Part, missing lanes are zero or `fill` (given in compute_t<T>).
template <class T, class Extent>
inline Vec<compute_t<T>> load(const T* p, Extent extent, Vec<compute_t<T>> fill) {
  if constexpr (sizeof(T) == 2) {
    return widen(load_raw(p, extent, narrow(fill, T{})), T{});
  } else {
    return load_raw(p, extent, fill);
  }
}
template <class T, class Extent>
inline Vec<compute_t<T>> load(const T* p, Extent extent) {
  return load(p, extent, Vec<compute_t<T>>{});
}
template <class T>
inline Vec<compute_t<T>> load(const T* p) {
  return load(p, Whole{});
}

template <class T, class Extent>
inline void store(T* p, Vec<compute_t<T>> v, Extent extent) {
  if constexpr (sizeof(T) == 2) {
    store_raw(p, narrow(v, T{}), extent);
  } else {
    store_raw(p, v, extent);
  }
}
template <class T>
inline void store(T* p, Vec<compute_t<T>> v) {
  store(p, v, Whole{});
}

// Calls f(i, slot, extent) for the vectors of n elements of type C. The slot runs 0..3 so that a reduction can keep
// four independent sums.
template <class C, class F>
inline __attribute__((always_inline)) void sweep(int64_t n, F&& f) {
  constexpr int L = kLanes<C>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    f(i, 0, Whole{});
    f(i + L, 1, Whole{});
    f(i + 2 * L, 2, Whole{});
    f(i + 3 * L, 3, Whole{});
  }
  for (; i + L <= n; i += L) f(i, 0, Whole{});
  if (i < n) f(i, 1, Part{n - i});
}

// ---- comparison and selection; a Mask<C> has one truth value per lane of Vec<C>

#if PYDL_VEC_BYTES == 64
template <class C>
struct MaskType {
  using type = __mmask16;
};
template <>
struct MaskType<double> {
  using type = __mmask8;
};
template <class C>
using Mask = typename MaskType<C>::type;

inline Mask<float> greater(VecF a, VecF b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
inline Mask<double> greater(VecD a, VecD b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
inline Mask<float> is_nan(VecF a) { return _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q); }
inline Mask<double> is_nan(VecD a) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)a, _CMP_UNORD_Q); }
template <class C, class V>
inline V select(Mask<C> mask, V yes, V no) {
  if constexpr (sizeof(C) == 4) {
    return (V)_mm512_mask_blend_epi32(mask, (__m512i)no, (__m512i)yes);
  } else {
    return (V)_mm512_mask_blend_epi64(mask, (__m512i)no, (__m512i)yes);
  }
}
template <class C>
inline bool any(Mask<C> mask) {
  return mask != 0;
}
inline Mask<float> equal(Vec<int32_t> a, Vec<int32_t> b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
inline Mask<double> equal(Vec<int64_t> a, Vec<int64_t> b) { return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b); }
inline Mask<float> join(Mask<double> low, Mask<double> high) { return Mask<float>(low | high << 8); }
#else
template <class C>
using Mask = IntVec<C>;

inline Mask<float> greater(VecF a, VecF b) { return a > b; }
inline Mask<double> greater(VecD a, VecD b) { return a > b; }
inline Mask<float> is_nan(VecF a) { return a != a; }
inline Mask<double> is_nan(VecD a) { return a != a; }
template <class C, class V>
inline V select(Mask<C> mask, V yes, V no) {
  return mask ? yes : no;
}
template <class C>
inline bool any(Mask<C> mask) {
  uint64_t words[PYDL_VEC_BYTES / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof(mask));
  for (uint64_t word : words) all |= word;
  return all != 0;
}
inline Mask<float> equal(Vec<int32_t> a, Vec<int32_t> b) { return a == b; }
inline Mask<double> equal(Vec<int64_t> a, Vec<int64_t> b) { return a == b; }
inline Mask<float> join(Mask<double> low, Mask<double> high);
#endif

// Small unsigned integers as wide as C, read from and written to bytes (the compilers' own conversions are slow here).
template <class C, class Extent>
inline IntVec<C> load_bytes(const uint8_t* p, Extent extent) {
  typedef VecN<uint8_t, kLanes<C>> Bytes;
  const Bytes bytes = load_raw(p, extent, Bytes{});
#if PYDL_VEC_BYTES == 16 && !defined(__SSE4_1__)
  return __builtin_convertvector(bytes, IntVec<C>);
#else
  __m128i wide = {};
  __builtin_memcpy(&wide, &bytes, sizeof(bytes));
#if PYDL_VEC_BYTES == 64
  if constexpr (sizeof(C) == 4) return (IntVec<C>)_mm512_maskz_cvtepu8_epi32(-1, wide);
  if constexpr (sizeof(C) == 8) return (IntVec<C>)_mm512_maskz_cvtepu8_epi64(-1, wide);
#elif PYDL_VEC_BYTES == 32
  if constexpr (sizeof(C) == 4) return (IntVec<C>)_mm256_cvtepu8_epi32(wide);
  if constexpr (sizeof(C) == 8) return (IntVec<C>)_mm256_cvtepu8_epi64(wide);
#else
  if constexpr (sizeof(C) == 4) return (IntVec<C>)_mm_cvtepu8_epi32(wide);
  if constexpr (sizeof(C) == 8) return (IntVec<C>)_mm_cvtepu8_epi64(wide);
#endif
#endif
}
template <class C, class Extent>
inline void store_bytes(uint8_t* p, IntVec<C> values, Extent extent) {
#if PYDL_VEC_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    store_raw(p, (VecN<uint8_t, 16>)_mm512_maskz_cvtepi32_epi8(-1, (__m512i)values), extent);
    return;
  }
#endif
  store_raw(p, __builtin_convertvector(values, VecN<uint8_t, kLanes<C>>), extent);
}

// One truth value per lane of Vec<C>: whether the 64-bit integer at p equals value. Missing lanes are undefined.
template <class C, class Extent>
inline Mask<C> equal_int64(const int64_t* p, int64_t value, Extent extent) {
  constexpr int L = kLanes<double>;
  const Vec<int64_t> wanted = splat(value);
  if constexpr (sizeof(C) == 8) {
    return equal(load_raw(p, extent, wanted), wanted);
  } else if constexpr (is_same<Extent, Whole>) {
    return join(equal(load_raw(p, Whole{}, wanted), wanted), equal(load_raw(p + L, Whole{}, wanted), wanted));
  } else {
    const Part low{smaller(extent.n, L)}, high{extent.n - low.n};
    return join(equal(load_raw(p, low, wanted), wanted), equal(load_raw(p + low.n, high, wanted), wanted));
  }
}

// Maximum of numbers; where a lane of either is NaN the result is b's.
inline VecF max_number(VecF a, VecF b) {
#if PYDL_VEC_BYTES == 64
  return (VecF)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#elif PYDL_VEC_BYTES == 32
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
inline VecD max_number(VecD a, VecD b) {
#if PYDL_VEC_BYTES == 64
  return (VecD)_mm512_maskz_max_pd(-1, (__m512d)a, (__m512d)b);
#elif PYDL_VEC_BYTES == 32
  return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__x86_64__)
  return (VecD)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

// ---- across lanes

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};
template <int N>
using indices = typename MakeIndices<N>::type;

template <int Start, class V, int... I>
inline V every_second(V a, V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (Start + 2 * I)...);
#else
  typedef decltype(a > b) Order;  // the integer vector that __builtin_shuffle wants
  return __builtin_shuffle(a, b, Order{(Start + 2 * I)...});
#endif
}
// Elements 0, 2, 4, ... and 1, 3, 5, ... of a followed by b.
template <class V>
inline V even(V a, V b) {
  return every_second<0>(a, b, indices<kLanesOf<V>>{});
}
template <class V>
inline V odd(V a, V b) {
  return every_second<1>(a, b, indices<kLanesOf<V>>{});
}

#if PYDL_VEC_BYTES != 64
inline Mask<float> join(Mask<double> low, Mask<double> high) { return even((Mask<float>)low, (Mask<float>)high); }
#endif

// Sum of the lanes, halves first: a fixed order.
template <class V>
inline lane_t<V> sum(V v) {
  constexpr int n = kLanesOf<V>;
  if constexpr (n == 2) {
    return v[0] + v[1];
  } else {
    typedef VecN<lane_t<V>, n / 2> HalfVec;
    HalfVec halves[2];
    __builtin_memcpy(halves, &v, sizeof(V));
    return sum<HalfVec>(halves[0] + halves[1]);
  }
}
template <class V>
inline V add_up(const V (&parts)[4]) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

}  // namespace
}  // namespace pydl::PYDL_ISA
