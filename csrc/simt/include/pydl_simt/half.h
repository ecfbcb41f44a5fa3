// __half and __nv_bfloat16 in software: conversions round to nearest even, arithmetic goes through fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "pydl_simt/math.h"

namespace pydl::simt {

inline uint16_t float_to_half_bits(float value) {
  uint32_t u = bits<uint32_t>(value);
  uint32_t sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7fffu);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  // Below 2^-14 the result is subnormal: 0.5 has the same ulp, 2^-24, so the addition rounds.
  if (u < 0x38800000u) return uint16_t(sign | (bits<uint32_t>(bits<float>(u) + 0.5f) - 0x3f000000u));
  u += 0xfffu + (u >> 13 & 1u);
  return uint16_t(sign | ((u - 0x38000000u) >> 13));
}

inline float half_bits_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16;
  uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits<float>(sign | ((magnitude << 13) + 0x38000000u));
  float tiny = float(magnitude) * 0x1p-24f;
  return bits<float>(sign | bits<uint32_t>(tiny));
}

inline uint16_t float_to_bfloat16_bits(float value) {
  uint32_t u = bits<uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

inline float bfloat16_bits_to_float(uint16_t h) { return bits<float>(uint32_t(h) << 16); }

}  // namespace pydl::simt

#define PYDL_SIMT_HALF(name, name2, to_bits, from_bits)                                                      \
  struct name {                                                                                              \
    uint16_t x;                                                                                              \
    name() = default;                                                                                        \
    name(float value) : x(pydl::simt::to_bits(value)) {}                                                     \
    operator float() const { return pydl::simt::from_bits(x); }                                              \
  };                                                                                                         \
  struct alignas(4) name2 {                                                                                  \
    name x, y;                                                                                               \
  };                                                                                                         \
  inline name operator+(name a, name b) { return name(float(a) + float(b)); }                                \
  inline name operator-(name a, name b) { return name(float(a) - float(b)); }                                \
  inline name operator*(name a, name b) { return name(float(a) * float(b)); }                                \
  inline name operator/(name a, name b) { return name(float(a) / float(b)); }                                \
  inline name operator-(name a) { return name(-float(a)); }                                                  \
  inline bool operator==(name a, name b) { return float(a) == float(b); }                                    \
  inline bool operator!=(name a, name b) { return float(a) != float(b); }                                    \
  inline bool operator<(name a, name b) { return float(a) < float(b); }                                      \
  inline bool operator>(name a, name b) { return float(a) > float(b); }                                      \
  inline bool operator<=(name a, name b) { return float(a) <= float(b); }                                    \
  inline bool operator>=(name a, name b) { return float(a) >= float(b); }                                    \
  inline name __hadd(name a, name b) { return a + b; }                                                       \
  inline name __hsub(name a, name b) { return a - b; }                                                       \
  inline name __hmul(name a, name b) { return a * b; }                                                       \
  inline name __hfma(name a, name b, name c) {                                                               \
    return name(float(double(float(a)) * double(float(b)) + double(float(c))));                              \
  }                                                                                                          \
  inline bool __hisnan(name a) { return std::isnan(float(a)); }                                              \
  inline name __hmax(name a, name b) { return name(std::fmax(float(a), float(b))); }                         \
  inline name __hmin(name a, name b) { return name(std::fmin(float(a), float(b))); }                         \
  inline name __hmax_nan(name a, name b) { return __hisnan(a) || __hisnan(b) ? name(NAN) : __hmax(a, b); }   \
  inline name __hmin_nan(name a, name b) { return __hisnan(a) || __hisnan(b) ? name(NAN) : __hmin(a, b); }   \
  inline name2 __hadd2(name2 a, name2 b) { return {a.x + b.x, a.y + b.y}; }                                  \
  inline name2 __hsub2(name2 a, name2 b) { return {a.x - b.x, a.y - b.y}; }                                  \
  inline name2 __hmul2(name2 a, name2 b) { return {a.x * b.x, a.y * b.y}; }                                  \
  inline name2 __hfma2(name2 a, name2 b, name2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline name2 __hmax2(name2 a, name2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                    \
  inline name2 __hmin2(name2 a, name2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                    \
  inline name2 __hmax2_nan(name2 a, name2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }        \
  inline name hexp(name a) { return name(std::exp(float(a))); }                                              \
  inline name hexp2(name a) { return name(std::exp2(float(a))); }                                            \
  inline name hlog2(name a) { return name(std::log2(float(a))); }                                            \
  inline name hrsqrt(name a) { return name(1.0f / std::sqrt(float(a))); }                                    \
  inline name2 h2exp(name2 a) { return {hexp(a.x), hexp(a.y)}; }                                             \
  inline name2 h2exp2(name2 a) { return {hexp2(a.x), hexp2(a.y)}; }                                          \
  inline name __low2half(name2 a) { return a.x; }                                                            \
  inline name __high2half(name2 a) { return a.y; }                                                           \
  inline float __low2float(name2 a) { return float(a.x); }                                                   \
  inline float __high2float(name2 a) { return float(a.y); }

PYDL_SIMT_HALF(__half, __half2, float_to_half_bits, half_bits_to_float)
PYDL_SIMT_HALF(__nv_bfloat16, __nv_bfloat162, float_to_bfloat16_bits, bfloat16_bits_to_float)
#undef PYDL_SIMT_HALF

using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
inline unsigned short __half_as_ushort(__half x) { return x.x; }
inline __half __ushort_as_half(unsigned short x) { return pydl::simt::bits<__half>(x); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return pydl::simt::bits<__nv_bfloat16>(x); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__nv_bfloat16(x), __nv_bfloat16(x)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {__nv_bfloat16(x.x), __nv_bfloat16(x.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {float(x.x), float(x.y)}; }
