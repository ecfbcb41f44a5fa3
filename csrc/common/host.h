// What the host functions of CPU ops share: reading tensors and allocating them through the stable shim. Included at
// ISA level 0 only.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dtype.h"

namespace pydl::host {
namespace {

using torch::stable::Tensor;
using MemoryFormat = torch::headeronly::MemoryFormat;
using Sizes = std::vector<int64_t>;

// One row per Dtype, in its order. The shim's codes are fixed while a process runs.
struct DtypeRow {
  int32_t code;
  const char* name;
};
inline const DtypeRow* dtype_rows() {
  static const DtypeRow rows[] = {{aoti_torch_dtype_float32(), "float32"},   {aoti_torch_dtype_float64(), "float64"},
                                  {aoti_torch_dtype_float16(), "float16"},   {aoti_torch_dtype_bfloat16(), "bfloat16"},
                                  {aoti_torch_dtype_uint8(), "uint8"},       {aoti_torch_dtype_int64(), "int64"},
                                  {aoti_torch_dtype_int32(), "int32"},       {aoti_torch_dtype_bool(), "bool"},
                                  {-1, "a dtype that this op does not take"}};
  return rows;
}
inline const char* name_of(Dtype dtype) { return dtype_rows()[int(dtype)].name; }
inline int32_t code_of(Dtype dtype) { return dtype_rows()[int(dtype)].code; }
inline Dtype dtype_of(int32_t code) {
  int i = 0;
  while (i < int(Dtype::kOther) && dtype_rows()[i].code != code) ++i;
  return Dtype(i);
}
inline bool is_floating(Dtype dtype) { return dtype <= Dtype::kBFloat16; }
inline Dtype compute_dtype(Dtype dtype) { return dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat; }
inline int64_t size_of(Dtype dtype) { return int64_t(aoti_torch_dtype_element_size(code_of(dtype))); }

// A tensor's metadata, read once: every question to a stable Tensor is a call into libtorch. Valid while the tensor
// lives.
struct Array {
  explicit Array(const Tensor& tensor) {
    AtenTensorHandle handle = tensor.get();
    int32_t code = 0;
    int64_t *sizes_out = nullptr, *strides_out = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_out));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_out));
    dtype = dtype_of(code);
    sizes = sizes_out;
    strides = strides_out;
  }
  int64_t numel() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dim; ++d) product *= sizes[d];
    return product;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }

  void* data = nullptr;
  Dtype dtype = Dtype::kOther;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
};

inline Tensor as_contiguous(const Tensor& tensor) {
  return Array(tensor).contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised CPU tensor and its memory. torch's fill_uninitialized_memory does not reach the shim's allocation,
// so the environment variable PYDL_POISON_MEMORY=1 (read at the first call) fills it with NaN for tests.
struct Output {
  Tensor tensor;
  void* data;
};

inline bool poison_memory() {
  static const bool wanted = [] {
    const char* value = std::getenv("PYDL_POISON_MEMORY");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return wanted;
}

// From 32 MiB on malloc maps fresh memory for every tensor, and its pages' faults take longer than most kernels:
// asks for pages of 2 MiB where the system gives them on request. A refusal changes nothing.
inline void use_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kMapped = int64_t(32) << 20;
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (bytes < kMapped) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Output empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, Dtype dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code_of(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  use_large_pages(data, bytes);
  if (poison_memory() && bytes > 0) std::memset(data, 0xff, size_t(bytes));
  return {std::move(tensor), data};
}

inline Output empty(const int64_t* sizes, int64_t dim, Dtype dtype) {
  constexpr int64_t kInline = 8;
  int64_t small[kInline];
  Sizes large(dim > kInline ? size_t(dim) : 0);
  int64_t* strides = dim > kInline ? large.data() : small;
  int64_t expected = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = expected;
    expected *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return empty_strided(sizes, strides, dim, dtype);
}

// Scratch memory of one call, aligned for every vector.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(bytes > 0 ? std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64) : nullptr) {
    STD_TORCH_CHECK(bytes <= 0 || memory_ != nullptr, "pydl: out of memory for ", bytes, " bytes of scratch");
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T = void>
  T* get() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
};

// Runs f(begin, end) over [0, count) on as many threads as leaves each about 32k elements of work. Ranges are
// contiguous; which thread gets which must not matter to the result.
template <class F>
inline void parallel(int64_t count, int64_t work_per_item, const F& f) {
  constexpr int64_t kGrain = 32768;
  if (count <= 0) return;
  const int64_t grain = work_per_item >= kGrain ? 1 : kGrain / (work_per_item > 0 ? work_per_item : 1);
  if (count <= grain) {
    f(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

}  // namespace
}  // namespace pydl::host
