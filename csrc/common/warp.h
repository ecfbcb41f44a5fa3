// Reductions over a warp and over a block, in a fixed order.
#pragma once

#include "common/device.h"
#include "common/shared.h"

namespace pydl {

__device__ inline int thread_in_block() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__device__ inline int lane_in_warp() { return thread_in_block() % kWarp; }

// Every lane gets combine over all 32 lanes; a butterfly, so all lanes get the same bits if combine commutes.
template <typename T, typename F>
__device__ T warp_reduce(T value, F combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

template <typename T>
__device__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

template <typename T>
__device__ T warp_max(T value) {
  return warp_reduce(value, [](T a, T b) { return a > b ? a : b; });
}

// Every thread gets combine over the block, whose size is a multiple of 32. `identity` leaves a value unchanged.
// All threads of the block must call it; it may be called again at once.
template <typename T, typename F>
__device__ T block_reduce(T value, T identity, F combine) {
  PYDL_SHARED(T, partial, kWarp);
  int thread = thread_in_block();
  int warps = int(blockDim.x * blockDim.y * blockDim.z) / kWarp;
  value = warp_reduce(value, combine);
  __syncthreads();
  if (thread % kWarp == 0) partial[thread / kWarp] = value;
  __syncthreads();
  value = thread % kWarp < warps ? partial[thread % kWarp] : identity;
  return warp_reduce(value, combine);
}

template <typename T>
__device__ T block_sum(T value) {
  return block_reduce(value, T(0), [](T a, T b) { return a + b; });
}

}  // namespace pydl
