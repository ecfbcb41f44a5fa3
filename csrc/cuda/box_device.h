// One box in the registers of a thread: loads and stores, and the arithmetic of box_pair.h on numbers.
#pragma once

#include "common/box.h"
#include "common/cuda_host.h"
#include "common/device_vec.h"
#include "common/indexing.h"

namespace pydl {
namespace {

using cuda_host::DeviceGuard;

constexpr int kBoxThreads = 256;

template <typename Number>
struct DeviceMath {
  using C = Number;
  using V = Number;

  static __device__ __forceinline__ V max(V a, V b) { return a > b ? a : b; }
  static __device__ __forceinline__ V min(V a, V b) { return a < b ? a : b; }
  static __device__ __forceinline__ bool greater(V a, V b) { return a > b; }
  static __device__ __forceinline__ V select(bool mask, V yes, V no) { return mask ? yes : no; }
  static __device__ __forceinline__ V atan_ratio(V w, V h) { return atan(w / h); }
};

template <typename T>
using DeviceBox = BoxOf<DeviceMath<acc_t<T>>>;

// A box is one load where all are aligned: half precision in 8 bytes, float in 16, double in two times 16.
template <typename T>
constexpr int kBoxPack = sizeof(T) * 4 < 16 ? 4 : 16 / sizeof(T);

inline bool boxes_aligned(const void* boxes, Dtype dtype) {
  return is_aligned(boxes, size_t(std::min<int64_t>(4 * host::size_of(dtype), 16)));
}

template <typename T>
__device__ __forceinline__ DeviceBox<T> load_box(const T* p, bool aligned) {
  if (aligned) {
    constexpr int N = kBoxPack<T>;
    Pack<T, N> first = load_pack<N>(p), last = first;
    if constexpr (N == 2) last = load_pack<N>(p + N);
    return {to_acc(first.at[0]), to_acc(first.at[1]), to_acc(last.at[N - 2]), to_acc(last.at[N - 1])};
  }
  return {to_acc(p[0]), to_acc(p[1]), to_acc(p[2]), to_acc(p[3])};
}

// Results are allocations of their own, and so aligned.
template <typename T>
__device__ __forceinline__ void store_box(T* p, const DeviceBox<T>& b) {
  constexpr int N = kBoxPack<T>;
  const T values[4] = {from_acc<T>(b.x1), from_acc<T>(b.y1), from_acc<T>(b.x2), from_acc<T>(b.y2)};
#pragma unroll
  for (int i = 0; i < 4; i += N) {
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.at[j] = values[i + j];
    store_pack(p + i, pack);
  }
}

inline unsigned box_grid(const char* op, int64_t items) {
  int64_t blocks = ceil_div(items, int64_t(kBoxThreads));
  STD_TORCH_CHECK(blocks <= kMaxGridX, op, ": too many boxes, ", items);
  return unsigned(blocks);
}

// An uninitialised contiguous tensor on the guarded device.
inline Output empty_on(const DeviceGuard& guard, const int64_t* sizes, int64_t dim, Dtype dtype) {
  Sizes strides(size_t(dim), 1);
  for (int64_t d = dim - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  return guard.empty_strided(sizes, strides.data(), dim, dtype);
}

}  // namespace
}  // namespace pydl
