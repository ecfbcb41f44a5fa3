// Kernels with one fault each, which the runner (or ASan under it) must find.
#include "common/atomics.h"
#include "common/device.h"
#include "common/shared.h"
#include "common/warp.h"
#include "unit.h"

namespace {

using namespace pydl;

__global__ void diverging_kernel(int* y) {
  if (threadIdx.x < 40) {
    __syncthreads();
    y[threadIdx.x] = 1;
  } else {
    y[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void early_exit_kernel(int* y, int n) {
  if (int(threadIdx.x) >= n) return;
  y[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] += 1;
}

__global__ void warp_divergence_kernel(int* y) {
  int value = int(threadIdx.x);
  if (threadIdx.x < 16) {
    value = __shfl_xor_sync(kFullMask, value, 1);
  } else {
    value = __shfl_xor_sync(kFullMask, value, 2);
  }
  y[threadIdx.x] = value;
}

// Half the lanes wait for a vote of all, the others at the barrier behind it.
__global__ void deadlock_kernel(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __any_sync(kFullMask, 1);
  __syncthreads();
}

__global__ void endless_spin_kernel(unsigned* flag) {
  while (load_acquire(flag) == 0) spin_pause();
}

// Reads lane 31 after it returned: undefined on a GPU, NaN here.
__global__ void dead_lane_kernel(float* y) {
  if (threadIdx.x == 31) return;
  y[threadIdx.x] = __shfl_sync(0x7fffffffu, 1.0f, threadIdx.x < 8 ? 31 : 3);
}

__global__ void unwritten_shared_kernel(float* y) {
  PYDL_SHARED(float, row, 32);
  y[threadIdx.x] = row[threadIdx.x];
}

template <bool Barrier>
__global__ void neighbour_kernel(const int* x, int* y) {
  PYDL_SHARED(int, row, 64);
  row[threadIdx.x] = x[threadIdx.x];
  if (Barrier) __syncthreads();
  y[threadIdx.x] = row[63 - threadIdx.x];
}

__global__ void shared_overflow_kernel(float* y, int extra) {
  PYDL_SHARED(float, row, 32);
  row[threadIdx.x + extra] = float(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = row[31 - threadIdx.x];
}

__global__ void dynamic_overflow_kernel(unsigned char* y, int extra) {
  PYDL_DYN_SHARED(unsigned char, row);
  row[threadIdx.x + extra] = (unsigned char)(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

__global__ void write_kernel(float* y, int n, int extra) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n + extra) y[i] = 1.0f;
}

__global__ void misaligned_kernel(const float* x, float* y, int step) {
  float4 value = *reinterpret_cast<const float4*>(x + threadIdx.x * step);
  y[threadIdx.x] = value.x + value.w;
}

}  // namespace

UNIT_EXPORT diverging(char* error, int* y) {
  return guarded(error, [&] { PYDL_LAUNCH(diverging_kernel, 2, 64, 0, nullptr, y); });
}
UNIT_EXPORT early_exit(char* error, int* y, int n) {
  return guarded(error, [&] { PYDL_LAUNCH(early_exit_kernel, 1, 64, 0, nullptr, y, n); });
}
UNIT_EXPORT warp_divergence(char* error, int* y) {
  return guarded(error, [&] { PYDL_LAUNCH(warp_divergence_kernel, 1, 32, 0, nullptr, y); });
}
UNIT_EXPORT deadlock(char* error, int* y) {
  return guarded(error, [&] { PYDL_LAUNCH(deadlock_kernel, 1, 32, 0, nullptr, y); });
}
UNIT_EXPORT endless_spin(char* error, unsigned* flag) {
  return guarded(error, [&] { PYDL_LAUNCH(endless_spin_kernel, 1, 64, 0, nullptr, flag); });
}
UNIT_EXPORT dead_lane(char* error, float* y) {
  return guarded(error, [&] { PYDL_LAUNCH(dead_lane_kernel, 1, 32, 0, nullptr, y); });
}
UNIT_EXPORT unwritten_shared(char* error, float* y) {
  return guarded(error, [&] { PYDL_LAUNCH(unwritten_shared_kernel, 2, 32, 0, nullptr, y); });
}
UNIT_EXPORT neighbour(char* error, const int* x, int* y, int barrier) {
  return guarded(error, [&] {
    if (barrier) {
      PYDL_LAUNCH(neighbour_kernel<true>, 1, 64, 0, nullptr, x, y);
    } else {
      PYDL_LAUNCH(neighbour_kernel<false>, 1, 64, 0, nullptr, x, y);
    }
  });
}
UNIT_EXPORT shared_overflow(char* error, float* y, int extra) {
  return guarded(error, [&] { PYDL_LAUNCH(shared_overflow_kernel, 1, 32, 0, nullptr, y, extra); });
}
UNIT_EXPORT dynamic_overflow(char* error, unsigned char* y, int bytes, int extra) {
  return guarded(error,
                 [&] { PYDL_LAUNCH(dynamic_overflow_kernel, 1, unsigned(bytes), size_t(bytes), nullptr, y, extra); });
}
UNIT_EXPORT write_global(char* error, float* y, int n, int extra) {
  return guarded(error,
                 [&] { PYDL_LAUNCH(write_kernel, unsigned((n + extra) / 64 + 1), 64, 0, nullptr, y, n, extra); });
}
UNIT_EXPORT misaligned(char* error, const float* x, float* y, int step) {
  return guarded(error, [&] { PYDL_LAUNCH(misaligned_kernel, 1, 4, 0, nullptr, x, y, step); });
}
UNIT_EXPORT oversized(char* error, float* y, int threads, int bytes) {
  return guarded(error, [&] { PYDL_LAUNCH(write_kernel, 1, unsigned(threads), size_t(bytes), nullptr, y, 1, 0); });
}
