// What the files of layer and RMS normalisation share: the arguments of the kernels; on the host, x as rows and
// parameters in the compute type.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

// Elements that are summed one after the other before their sums are.
inline constexpr int64_t kSumBlock = 2048;

// Parameters and statistics are of the compute type, null if absent. Without a mean it is RMS normalisation: the mean
// is taken for 0, and rstd is 1 / sqrt(mean square + eps).
struct LayerNormFwd {
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
  void* mean;
  void* rstd;
  int64_t cols, row_stride;
  double eps;
  Dtype dtype;
};

struct LayerNormBwd {
  const void* dy;
  const void* x;
  const void* mean;
  const void* rstd;
  const void* weight;
  void* dx;       // null if not wanted
  void* partial;  // [chunks][2][cols], null if neither dweight nor dbias is wanted
  int64_t rows, cols, dy_stride, x_stride, chunk_rows;
  Dtype dtype;
};

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

#include "common/host.h"

namespace pydl {

PYDL_CPU_DECLARE(void, layer_norm_widen, const void*, Dtype, void*, int64_t)
PYDL_CPU_DECLARE(void, layer_norm_fwd_rows, const LayerNormFwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, layer_norm_bwd_chunks, const LayerNormBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, layer_norm_reduce, const void*, int64_t, int64_t, void*, Dtype, int64_t, int64_t)

namespace {

using namespace host;

// Rows per partial sum: at least 8 chunks where there are rows for them, 16 rows in each where possible, at most 64
// chunks. Depends on nothing but the shape, so neither does the order of the sums.
inline int64_t rows_per_chunk(int64_t rows, int64_t cols) {
  if (rows * cols <= 32768) return rows;
  const int64_t eighth = (rows + 7) / 8, sixtyfourth = (rows + 63) / 64;
  return std::max(std::min<int64_t>(16, eighth), sixtyfourth);
}

// All rows forwards; rows of another type than the compute type are widened first.
inline void run_rows(const LayerNormFwd& args, int64_t rows, Dtype compute) {
  parallel(rows, args.cols, [&](int64_t begin, int64_t end) {
    const Scratch buffer(compute == args.dtype ? 0 : args.cols * size_of(compute));
    PYDL_CPU_DISPATCH(layer_norm_fwd_rows)(args, buffer.get(), begin, end);
  });
}

// dx if args.dx is there, and the sums over rows that are wanted: of dy * xhat in the first output, of dy in the
// second.
inline void run_backward(LayerNormBwd args, Dtype compute, Dtype param, void* dweight, void* dbias) {
  const bool params = dweight != nullptr || dbias != nullptr;
  if (args.cols == 0 || !(params || args.dx != nullptr)) return;
  args.chunk_rows = rows_per_chunk(args.rows, args.cols);
  const int64_t chunks = args.rows == 0 ? 0 : (args.rows + args.chunk_rows - 1) / args.chunk_rows;
  const Scratch partial(params ? chunks * 2 * args.cols * size_of(compute) : 0);
  args.partial = partial.get();
  parallel(chunks, args.chunk_rows * args.cols,
           [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(layer_norm_bwd_chunks)(args, begin, end); });
  const char* from = partial.get<char>();
  parallel(params ? args.cols : 0, chunks / 2 + 1, [&](int64_t begin, int64_t end) {
    const auto reduce = PYDL_CPU_DISPATCH(layer_norm_reduce);
    const int64_t second = chunks > 0 ? args.cols * size_of(compute) : 0;
    if (dweight != nullptr) reduce(from, chunks, 2 * args.cols, dweight, param, begin, end);
    if (dbias != nullptr) reduce(from + second, chunks, 2 * args.cols, dbias, param, begin, end);
  });
}

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

inline void check_gradient(const char* op, const Array& dy, const Array& x) {
  STD_TORCH_CHECK(dy.dtype == x.dtype, op, ": dy must be ", name_of(x.dtype), " as x, got ", name_of(dy.dtype));
  STD_TORCH_CHECK(dy.dim == x.dim && std::equal(dy.sizes, dy.sizes + x.dim, x.sizes), op,
                  ": dy must have the shape of x");
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
