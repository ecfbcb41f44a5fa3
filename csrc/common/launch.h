// Kernel launches in one spelling:
//
//   PYDL_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, args...)
//   PYDL_LAUNCH((kernel<T, 4>), ...)                template arguments with commas need the parentheses
//   PYDL_LAUNCH_COOPERATIVE(...)                    all blocks resident at once, needed by grid_barrier()
//
// Both throw std::runtime_error when the launch is refused; on the host also when a device thread fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device.h"

#define PYDL_LAUNCH(kernel, grid, block, dynamic_shared, stream, ...) \
  ::pydl::launch(#kernel, false, kernel, grid, block, dynamic_shared, stream, ##__VA_ARGS__)
#define PYDL_LAUNCH_COOPERATIVE(kernel, grid, block, dynamic_shared, stream, ...) \
  ::pydl::launch(#kernel, true, kernel, grid, block, dynamic_shared, stream, ##__VA_ARGS__)

namespace pydl {

constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridYZ = 65535;

#ifdef PYDL_SIMT

template <typename... Params, typename... Args>
void launch(const char* name, bool cooperative, void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared,
            cudaStream_t, Args&&... args) {
  simt::launch(kernel, {name, grid, block, dynamic_shared, cooperative}, static_cast<Params>(args)...);
}

inline int multiprocessor_count() {
  return 4;  // small, so that grid-stride loops take more than one step in tests
}

template <typename... Params>
int resident_blocks(void (*)(Params...), int, size_t) {
  return 16;
}

#else

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("pydl: ") + what + ": " + cudaGetErrorString(error));
  }
}

template <typename Kernel>
void allow_dynamic_shared(const char* name, Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), name);
  }
}

template <typename... Params, typename... Args>
void launch(const char* name, bool cooperative, void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared,
            cudaStream_t stream, Args&&... args) {
  allow_dynamic_shared(name, kernel, dynamic_shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  cudaGetLastError();
  check_cuda(error, name);
}

// Of the current device; cached per thread, since the query is called at every launch of a grid-stride kernel.
inline int multiprocessor_count() {
  thread_local int cached_device = -1;
  thread_local int cached_count = 0;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device != cached_device) {
    check_cuda(cudaDeviceGetAttribute(&cached_count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    cached_device = device;
  }
  return cached_count;
}

// How many blocks of a kernel fit on the device at once: the bound on a cooperative launch's grid.
template <typename... Params>
int resident_blocks(void (*kernel)(Params...), int threads, size_t dynamic_shared) {
  allow_dynamic_shared("resident_blocks", kernel, dynamic_shared);
  int per_multiprocessor = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, dynamic_shared),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return per_multiprocessor * multiprocessor_count();
}

#endif

// A grid for `work` units at one per block, for kernels with a grid-stride loop over blocks.
inline unsigned grid_size(int64_t work, int64_t most = kMaxGridX) {
  return unsigned(work < 1 ? 1 : (work < most ? work : most));
}

}  // namespace pydl
