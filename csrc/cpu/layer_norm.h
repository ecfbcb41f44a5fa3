// What the files of layer normalisation share: on the host, x as rows and parameters in the compute type.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

// Elements that are summed one after the other before their sums are.
inline constexpr int64_t kSumBlock = 2048;

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

#include "common/host.h"

namespace pydl {

PYDL_CPU_DECLARE(void, layer_norm_widen, const void*, Dtype, void*, int64_t)

namespace {

using namespace host;

struct Split {
  int64_t rows, cols, outer;  // outer: number of dimensions before the normalised ones
};

inline Split split_rows(const char* op, const Array& x, const Sizes& shape) {
  const int64_t inner = int64_t(shape.size());
  STD_TORCH_CHECK(is_floating(x.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(inner >= 1 && inner <= x.dim, op, ": normalized_shape must name 1 to ", x.dim,
                  " trailing dimensions of x, got ", inner);
  Split split{1, 1, x.dim - inner};
  for (int64_t d = 0; d < x.dim; ++d) {
    const bool normalised = d >= split.outer;
    STD_TORCH_CHECK(!normalised || shape[size_t(d - split.outer)] == x.sizes[d], op,
                    ": normalized_shape must equal the trailing sizes of x, got ", shape[size_t(d - split.outer)],
                    " where x has ", x.sizes[d]);
    (normalised ? split.cols : split.rows) *= x.sizes[d];
  }
  return split;
}

// The tensor as rows at one stride with unit stride inside: itself if its strides allow, else a copy.
struct Rows {
  Rows(const Tensor& t, int64_t outer) : tensor(t), array(t), stride(find_stride(outer)) {
    if (stride < 0) {
      tensor = torch::stable::contiguous(t);
      array = Array(tensor);
      stride = find_stride(outer);
    }
  }
  // Distance between neighbouring rows in elements, -1 if it is not the same everywhere.
  int64_t find_stride(int64_t outer) const {
    if (array.numel() == 0) return 0;
    int64_t expected = 1, d = array.dim - 1;
    for (; d >= outer; --d) {
      if (array.sizes[d] != 1 && array.strides[d] != expected) return -1;
      expected *= array.sizes[d];
    }
    int64_t row = -1;
    for (; d >= 0; --d) {
      if (array.sizes[d] == 1) continue;
      if (row < 0) {
        row = expected = array.strides[d];
      } else if (array.strides[d] != expected) {
        return -1;
      }
      expected *= array.sizes[d];
    }
    return row < 0 ? 0 : row;
  }

  Tensor tensor;
  Array array;
  int64_t stride;
};

// A parameter or statistic as contiguous memory of the compute type.
struct Operand {
  Operand(const char* op, const char* name, const std::optional<Tensor>& t, int64_t numel, Dtype dtype, Dtype compute) {
    if (!t.has_value()) return;
    tensor = as_contiguous(*t);
    const Array array(*tensor);
    STD_TORCH_CHECK(array.numel() == numel, op, ": ", name, " must have ", numel, " elements, got ", array.numel());
    STD_TORCH_CHECK(array.dtype == dtype || array.dtype == compute, op, ": ", name, " must be ", name_of(dtype), " or ",
                    name_of(compute), ", got ", name_of(array.dtype));
    data = array.data;
    if (array.dtype != compute) {
      wide = std::make_unique<Scratch>(numel * size_of(compute));
      PYDL_CPU_DISPATCH(layer_norm_widen)(array.data, array.dtype, wide->get(), numel);
      data = wide->get();
    }
  }

  std::optional<Tensor> tensor;
  std::unique_ptr<Scratch> wide;
  const void* data = nullptr;
};

}  // namespace
}  // namespace pydl

#endif
