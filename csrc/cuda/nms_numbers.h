// Reading and writing single elements of any floating dtype.
#pragma once

#include "common/device.h"
#include "common/dtype.h"

namespace pydl {
namespace {

__device__ inline double load_number(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kDouble:
      return static_cast<const double*>(data)[i];
    case Dtype::kHalf:
      return to_acc(static_cast<const __half*>(data)[i]);
    case Dtype::kBFloat16:
      return to_acc(static_cast<const __nv_bfloat16*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ inline void store_number(void* data, Dtype dtype, int64_t i, double value) {
  switch (dtype) {
    case Dtype::kDouble:
      static_cast<double*>(data)[i] = value;
      break;
    case Dtype::kHalf:
      static_cast<__half*>(data)[i] = from_acc<__half>(float(value));
      break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[i] = from_acc<__nv_bfloat16>(float(value));
      break;
    default:
      static_cast<float*>(data)[i] = float(value);
  }
}

}  // namespace
}  // namespace pydl
