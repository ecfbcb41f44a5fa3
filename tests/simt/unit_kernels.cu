// Kernels that must give one right result under every schedule.
#include "common/atomics.h"
#include "common/device.h"
#include "common/indexing.h"
#include "common/shared.h"
#include "common/warp.h"
#include "common/warp_matrix.h"
#include "unit.h"

namespace {

using namespace pydl;

// Rows of y: xor 1, xor 16, up 3, up 3 in segments of 8, down 5, down 5 in segments of 8, lane 7, segment's lane 2.
template <typename T>
__global__ void shuffle_kernel(const T* x, T* y) {
  int lane = int(threadIdx.x);
  T value = x[lane];
  y[lane] = __shfl_xor_sync(kFullMask, value, 1);
  y[32 + lane] = __shfl_xor_sync(kFullMask, value, 16);
  y[64 + lane] = __shfl_up_sync(kFullMask, value, 3);
  y[96 + lane] = __shfl_up_sync(kFullMask, value, 3, 8);
  y[128 + lane] = __shfl_down_sync(kFullMask, value, 5);
  y[160 + lane] = __shfl_down_sync(kFullMask, value, 5, 8);
  y[192 + lane] = __shfl_sync(kFullMask, value, 7);
  y[224 + lane] = __shfl_sync(kFullMask, value, 2, 8);
}

// Each half of the warp shuffles on its own; 48 threads make the second warp a partial one.
__global__ void partial_warp_kernel(const int* x, int* y) {
  int thread = int(threadIdx.x);
  int lane = thread % 32;
  unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int value = x[thread];
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
  } else {
    for (int offset = 8; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(mask, value, offset));
  }
  y[thread] = value;
}

__global__ void vote_kernel(const int* x, unsigned* y) {
  int lane = int(threadIdx.x);
  int value = x[lane];
  y[lane] = __ballot_sync(kFullMask, value > 0);
  y[32 + lane] = unsigned(__any_sync(kFullMask, value > 1000));
  y[64 + lane] = unsigned(__all_sync(kFullMask, value > -1000));
  y[96 + lane] = __activemask();
  y[128 + lane] = __match_any_sync(kFullMask, value);
  y[160 + lane] = unsigned(__popc(unsigned(value)) + 100 * __clz(value) + 10000 * __ffs(value));
}

__global__ void reverse_kernel(const float* x, float* y, int n) {
  PYDL_SHARED(float, fixed, 256);
  PYDL_DYN_SHARED(float, row);
  int64_t base = int64_t(blockIdx.x) * n;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) row[i] = x[base + i];
  fixed[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  float other = fixed[blockDim.x - 1 - threadIdx.x];
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) y[base + i] = row[n - 1 - i] + 0.0f * other;
  int count = __syncthreads_count(threadIdx.x % 2 == 0);
  if (threadIdx.x == 0) y[base] += float(count) - float((blockDim.x + 1) / 2);
}

__global__ void block_sum_kernel(const float* x, float* y, int n) {
  float sum = 0.0f;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) sum += x[int64_t(blockIdx.x) * n + i];
  sum = block_sum(sum);
  float most = block_reduce(sum, -INFINITY, [](float a, float b) { return a > b ? a : b; });
  if (threadIdx.x == blockDim.x - 1) y[blockIdx.x] = most;
}

// y: add, max, min, number of CAS winners, exch count, 64-bit add's low and high word.
__global__ void atomics_kernel(int* y, unsigned long long* wide, float* sum) {
  int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&y[0], thread);
  atomicMax(&y[1], thread);
  atomicMin(&y[2], -thread);
  if (atomicCAS(&y[3], 0, thread + 1) == 0) atomicAdd(&y[4], 1);
  atomicAdd(&y[5], atomicExch(&y[6], 1));
  atomicAdd(wide, 1ull << 31);
  atomicAdd(sum, 0.5f);
}

// Every block adds the values that all blocks wrote in the step before: wrong unless the barrier holds all of them.
__global__ void grid_kernel(int* values, unsigned* counter, int steps) {
  int blocks = int(gridDim.x);
  for (int step = 0; step < steps; ++step) {
    const int* from = values + step % 2 * blocks;
    int* to = values + (step + 1) % 2 * blocks;
    int sum = 0;
    for (int b = int(threadIdx.x); b < blocks; b += int(blockDim.x)) sum += from[b];
    sum = block_reduce(sum, 0, [](int a, int b) { return a + b; });
    if (threadIdx.x == 0) to[blockIdx.x] = sum % 1000 + int(blockIdx.x);
    grid_barrier(counter);
  }
}

template <typename T, bool Columns>
__global__ void product_kernel(const T* a, const T* b, float* c) {
  WarpTileA<T> tile_a;
  WarpTileB<T, Columns> tile_b;
  WarpTileC tile_c;
  fill(tile_c, 0.0f);
  for (int k = 0; k < 32; k += 16) {
    load(tile_a, a + k, 32);
    load(tile_b, Columns ? b + k : b + k * 16, Columns ? 32 : 16);
    multiply(tile_c, tile_a, tile_b);
  }
  for (int i = 0; i < tile_c.num_elements; ++i) tile_c.x[i] *= 2.0f;
  store(c, tile_c, 16);
}

template <typename T>
__global__ void round_kernel(const float* x, T* low, float* back, int n) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  low[i] = from_acc<T>(x[i]);
  back[i] = to_acc(low[i]);
}

template <typename T>
__global__ void widen_kernel(const T* low, float* x, int n) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] = to_acc(low[i]);
}

template <typename T>
int shuffle(char* error, const void* x, void* y) {
  return guarded(
      error, [&] { PYDL_LAUNCH(shuffle_kernel<T>, 1, 32, 0, nullptr, static_cast<const T*>(x), static_cast<T*>(y)); });
}

template <typename T>
int convert(char* error, const float* x, void* low, float* back, int n) {
  return guarded(error, [&] {
    unsigned grid = unsigned(ceil_div(n, 256));
    if (x != nullptr) {
      PYDL_LAUNCH(round_kernel<T>, grid, 256, 0, nullptr, x, static_cast<T*>(low), back, n);
    } else {
      PYDL_LAUNCH(widen_kernel<T>, grid, 256, 0, nullptr, static_cast<const T*>(low), back, n);
    }
  });
}

template <typename T>
int product(char* error, const void* a, const void* b, float* c, int columns) {
  return guarded(error, [&] {
    auto* typed_a = static_cast<const T*>(a);
    auto* typed_b = static_cast<const T*>(b);
    if (columns) {
      PYDL_LAUNCH((product_kernel<T, true>), 1, 32, 0, nullptr, typed_a, typed_b, c);
    } else {
      PYDL_LAUNCH((product_kernel<T, false>), 1, 32, 0, nullptr, typed_a, typed_b, c);
    }
  });
}

}  // namespace

UNIT_EXPORT shuffle_float32(char* error, const void* x, void* y) { return shuffle<float>(error, x, y); }
UNIT_EXPORT shuffle_float64(char* error, const void* x, void* y) { return shuffle<double>(error, x, y); }
UNIT_EXPORT shuffle_float16(char* error, const void* x, void* y) { return shuffle<__half>(error, x, y); }
UNIT_EXPORT shuffle_int32(char* error, const void* x, void* y) { return shuffle<int>(error, x, y); }
UNIT_EXPORT shuffle_int64(char* error, const void* x, void* y) { return shuffle<long long>(error, x, y); }

UNIT_EXPORT split(char* error, uint64_t item, int base, int* digit, uint64_t* rest) {
  return guarded(error, [&] {
    *digit = take_digit(item, base);
    *rest = item;
  });
}

UNIT_EXPORT partial_warp(char* error, const int* x, int* y) {
  return guarded(error, [&] { PYDL_LAUNCH(partial_warp_kernel, 1, 48, 0, nullptr, x, y); });
}

UNIT_EXPORT vote(char* error, const int* x, unsigned* y) {
  return guarded(error, [&] { PYDL_LAUNCH(vote_kernel, 1, 32, 0, nullptr, x, y); });
}

UNIT_EXPORT reverse(char* error, const float* x, float* y, int rows, int n, int threads) {
  return guarded(error, [&] {
    PYDL_LAUNCH(reverse_kernel, unsigned(rows), unsigned(threads), n * sizeof(float), nullptr, x, y, n);
  });
}

UNIT_EXPORT sum_rows(char* error, const float* x, float* y, int rows, int n, int threads) {
  return guarded(error, [&] { PYDL_LAUNCH(block_sum_kernel, unsigned(rows), unsigned(threads), 0, nullptr, x, y, n); });
}

UNIT_EXPORT atomics(char* error, int* y, unsigned long long* wide, float* sum) {
  return guarded(error, [&] { PYDL_LAUNCH(atomics_kernel, 8, 128, 0, nullptr, y, wide, sum); });
}

UNIT_EXPORT grid(char* error, int* values, unsigned* counter, int blocks, int threads, int steps, int cooperative) {
  return guarded(error, [&] {
    if (cooperative) {
      PYDL_LAUNCH_COOPERATIVE(grid_kernel, unsigned(blocks), unsigned(threads), 0, nullptr, values, counter, steps);
    } else {
      PYDL_LAUNCH(grid_kernel, unsigned(blocks), unsigned(threads), 0, nullptr, values, counter, steps);
    }
  });
}

UNIT_EXPORT product_float16(char* error, const void* a, const void* b, float* c, int columns) {
  return product<__half>(error, a, b, c, columns);
}
UNIT_EXPORT product_bfloat16(char* error, const void* a, const void* b, float* c, int columns) {
  return product<__nv_bfloat16>(error, a, b, c, columns);
}

UNIT_EXPORT convert_float16(char* error, const float* x, void* low, float* back, int n) {
  return convert<__half>(error, x, low, back, n);
}
UNIT_EXPORT convert_bfloat16(char* error, const float* x, void* low, float* back, int n) {
  return convert<__nv_bfloat16>(error, x, low, back, n);
}
