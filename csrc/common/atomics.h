// Waiting and signalling between threads of different warps and blocks.
#pragma once

#include "common/device.h"

namespace pydl {

#ifdef PYDL_SIMT

__device__ inline void spin_pause() { simt::spin_pause(); }

__device__ inline unsigned load_acquire(const unsigned* address) {
  return *const_cast<const volatile unsigned*>(address);
}

__device__ inline void store_release(unsigned* address, unsigned value) { atomicExch(address, value); }

__device__ inline void check_grid_barrier() {
  if (!simt::launch_is_cooperative()) simt::fail("grid_barrier() needs PYDL_LAUNCH_COOPERATIVE");
}

#else

// Every loop that waits for another thread's store calls this: on the host it lets that thread run.
__device__ inline void spin_pause() { __nanosleep(32); }

__device__ inline unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void store_release(unsigned* address, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline void check_grid_barrier() {}

#endif

// Waits until all `blocks` blocks that share the counter are here: any subset of a cooperative launch, each calling as
// often as the others. The counter is a zeroed word in global memory; it grows by the number of blocks per barrier and
// may do so 2^31 / blocks times.
__device__ inline void blocks_barrier(unsigned* counter, unsigned blocks) {
  check_grid_barrier();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();
    unsigned ticket = atomicAdd(counter, 1u);
    unsigned target = (ticket / blocks + 1) * blocks;
    while (load_acquire(counter) < target) spin_pause();
    __threadfence();
  }
  __syncthreads();
}

// Waits until all blocks of a cooperative launch are here.
__device__ inline void grid_barrier(unsigned* counter) { blocks_barrier(counter, gridDim.x * gridDim.y * gridDim.z); }

}  // namespace pydl
