// Aligned groups of N values that move as one load or store of up to 16 bytes.
#pragma once

#include "common/device.h"

namespace pydl {

template <int Bytes>
struct RawBytes;
template <>
struct RawBytes<16> {
  using type = uint4;
};
template <>
struct RawBytes<8> {
  using type = uint2;
};
template <>
struct RawBytes<4> {
  using type = unsigned;
};
template <>
struct RawBytes<2> {
  using type = unsigned short;
};
template <>
struct RawBytes<1> {
  using type = unsigned char;
};

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// Through an integer type of the full width, so that the access is one instruction for every T.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* address) {
  using Raw = typename RawBytes<int(sizeof(T)) * N>::type;
  union Bits {
    Raw raw;
    Pack<T, N> pack;
    __device__ Bits() {}
  } bits;
  bits.raw = *reinterpret_cast<const Raw*>(address);
  return bits.pack;
}

template <int N, typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, N>& pack) {
  using Raw = typename RawBytes<int(sizeof(T)) * N>::type;
  union Bits {
    Raw raw;
    Pack<T, N> pack;
    __device__ Bits() {}
  } bits;
  bits.pack = pack;
  *reinterpret_cast<Raw*>(address) = bits.raw;
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace pydl
