// What host functions of CUDA ops share: device guard, stream, allocation, registration. In the SIMT host runner the
// same functions work on CPU tensors and register under pydl_simt.
#pragma once

#include "common/host.h"
#include "common/launch.h"

#ifdef PYDL_SIMT
#define PYDL_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pydl_simt, CPU, m)
#else
#define PYDL_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pydl, CUDA, m)
#endif

// Runs the statement with T bound to the device type of a floating dtype; nothing for the others.
#define PYDL_CUDA_FLOAT_SWITCH(dtype, ...) \
  switch (dtype) {                         \
    case ::pydl::Dtype::kFloat: {          \
      using T = float;                     \
      __VA_ARGS__;                         \
    } break;                               \
    case ::pydl::Dtype::kDouble: {         \
      using T = double;                    \
      __VA_ARGS__;                         \
    } break;                               \
    case ::pydl::Dtype::kHalf: {           \
      using T = __half;                    \
      __VA_ARGS__;                         \
    } break;                               \
    case ::pydl::Dtype::kBFloat16: {       \
      using T = __nv_bfloat16;             \
      __VA_ARGS__;                         \
    } break;                               \
    default:                               \
      break;                               \
  }

namespace pydl::cuda_host {
namespace {

using host::Array;
using host::Output;
using host::Sizes;
using torch::stable::Tensor;

// Makes the tensor's device current for the guard's life and knows its current stream.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) {
    AtenTensorHandle handle = tensor.get();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index_));
#ifndef PYDL_SIMT
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index_, &guard_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
#endif
  }
#ifndef PYDL_SIMT
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }
#else
  ~DeviceGuard() = default;
#endif
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaStream_t stream() const { return stream_; }

  void check_same(const char* op, const char* name, const Tensor& other) const {
    int32_t type = 0, index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(other.get(), &index));
    STD_TORCH_CHECK(type == type_ && index == index_, op, ": ", name,
                    " must be on the same device as the first tensor");
  }

  // Uninitialised memory on the guarded device; NaN with PYDL_POISON_MEMORY=1.
  Output empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, Dtype dtype) const {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, host::code_of(dtype), type_, index_, &handle));
    Tensor tensor(handle);
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    if (host::poison_memory()) poison(handle, data);
    return {std::move(tensor), data};
  }

  // Copies from device memory to the host's, and waits for it.
  void read(void* to, const void* from, size_t bytes) const {
#ifdef PYDL_SIMT
    std::memcpy(to, from, bytes);
#else
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
#endif
  }

  // Copies inside device memory, in the stream's order.
  void copy(void* to, const void* from, size_t bytes) const {
#ifdef PYDL_SIMT
    std::memcpy(to, from, bytes);
#else
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "cudaMemcpyAsync");
#endif
  }

  // Every byte of device memory, in the stream's order: 0 is zero, 0xff is NaN in every floating type.
  void fill_bytes(void* data, int byte, size_t bytes) const {
#ifdef PYDL_SIMT
    std::memset(data, byte, bytes);
#else
    check_cuda(cudaMemsetAsync(data, byte, bytes, stream_), "cudaMemsetAsync");
#endif
  }

 private:
  void poison(AtenTensorHandle handle, void* data) const {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    if (bytes > 0) fill_bytes(data, 0xff, size_t(bytes));
  }

  int32_t type_ = 0;
  int32_t index_ = 0;
  cudaStream_t stream_ = nullptr;
#ifndef PYDL_SIMT
  CUDAGuardHandle guard_ = nullptr;
#endif
};

}  // namespace
}  // namespace pydl::cuda_host
