// What the host functions of the CPU's alignment and decoding check and read. Included at ISA level 0 only.
#pragma once

#include "common/host.h"

namespace pydl {
namespace {

inline bool is_integer(Dtype dtype) { return dtype == Dtype::kInt64 || dtype == Dtype::kInt32; }

inline int64_t integer_at(const host::Array& a, int64_t i) {
  return a.dtype == Dtype::kInt64 ? static_cast<const int64_t*>(a.data)[i] : static_cast<const int32_t*>(a.data)[i];
}

inline void check_log_probs(const char* op, const host::Array& x, int64_t blank) {
  STD_TORCH_CHECK(x.dim == 3 && host::is_floating(x.dtype), op,
                  ": x must be float32, float64, float16 or bfloat16 of shape [T, N, C]");
  STD_TORCH_CHECK(blank >= 0 && blank < x.sizes[2], op, ": blank must be in [0, ", x.sizes[2], "), got ", blank);
}

// One length in [0, most] for each item.
inline host::Sizes read_lengths(const char* op, const char* name, const host::Tensor& tensor, int64_t items,
                                int64_t most) {
  const host::Array a(tensor);
  STD_TORCH_CHECK(is_integer(a.dtype) && a.dim == 1 && a.sizes[0] == items, op, ": ", name,
                  " must be int32 or int64 of shape [", items, "]");
  host::Sizes lengths(static_cast<size_t>(items));
  for (int64_t n = 0; n < items; ++n) {
    const int64_t length = lengths[size_t(n)] = integer_at(a, n * a.strides[0]);
    STD_TORCH_CHECK(length >= 0 && length <= most, op, ": ", name, "[", n, "] must be in [0, ", most, "], got ",
                    length);
  }
  return lengths;
}

// The frames of each item: all of them without a tensor.
inline host::Sizes read_frames(const char* op, const std::optional<host::Tensor>& tensor, int64_t items,
                               int64_t frames) {
  if (!tensor.has_value()) return host::Sizes(size_t(items), frames);
  return read_lengths(op, "input_lengths", *tensor, items, frames);
}

}  // namespace
}  // namespace pydl
