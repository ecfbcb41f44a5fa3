// What the host functions of box ops share, CPU and CUDA alike: the arguments of the kernels and their checks.
#pragma once

#include <stdint.h>

#include "common/box_pair.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

// Every box of one set with every box of another, in `batch` independent problems.
struct BoxPairs {
  int64_t batch, n, m;
  const void *boxes1, *boxes2;  // [batch, n, 4], [batch, m, 4]
  Dtype dtype;                  // of the boxes; the rest is float, or double for double
  int64_t kind;
  double eps;
};

// Boxes in pairs, or each on its own.
struct BoxRows {
  int64_t count;
  const void *boxes1, *boxes2;  // [count, 4]
  Dtype dtype;
  int64_t kind;
  double eps;
};

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

#include "common/host.h"

namespace pydl {
namespace {

using host::Array;
using host::Output;
using host::Sizes;
using host::Tensor;

// Rows of boxes1 whose contributions to the gradient of boxes2 are summed before those of other rows: at most 64
// partial sums, whose number depends on the shape alone.
inline int64_t rows_per_partial(int64_t n) { return std::max<int64_t>(32, (n + 63) / 64); }

inline void check_boxes(const char* op, const char* name, const Array& boxes) {
  STD_TORCH_CHECK(host::is_floating(boxes.dtype), op, ": ", name,
                  " must be float32, float64, float16 or bfloat16, got ", host::name_of(boxes.dtype));
  STD_TORCH_CHECK(boxes.dim >= 1 && boxes.sizes[boxes.dim - 1] == 4, op, ": ", name, " must have shape [..., 4]");
}

inline void check_kind(const char* op, int64_t kind) {
  STD_TORCH_CHECK(kind >= kIou && kind <= kCompleteIou, op, ": kind must be 0, 1, 2 or 3, got ", kind);
}

// The arguments of a pairwise op; both tensors are contiguous.
inline BoxPairs box_pairs(const char* op, const Array& boxes1, const Array& boxes2, int64_t kind, double eps) {
  check_boxes(op, "boxes1", boxes1);
  check_boxes(op, "boxes2", boxes2);
  check_kind(op, kind);
  const int64_t dim = boxes1.dim;
  STD_TORCH_CHECK((dim == 2 || dim == 3) && boxes2.dim == dim, op,
                  ": boxes1 and boxes2 must both be [N, 4] or both [B, N, 4], got ", dim, " and ", boxes2.dim,
                  " dimensions");
  STD_TORCH_CHECK(boxes1.dtype == boxes2.dtype, op, ": boxes2 must be ", host::name_of(boxes1.dtype), ", got ",
                  host::name_of(boxes2.dtype));
  STD_TORCH_CHECK(dim == 2 || boxes1.sizes[0] == boxes2.sizes[0], op, ": boxes2 must have ", boxes1.sizes[0],
                  " sets of boxes, got ", boxes2.sizes[0]);
  return {dim == 2 ? 1 : boxes1.sizes[0],
          boxes1.sizes[dim - 2],
          boxes2.sizes[dim - 2],
          boxes1.data,
          boxes2.data,
          boxes1.dtype,
          kind,
          eps};
}

// [N, M] or [B, N, M], the shape of a pairwise result.
inline Sizes pair_sizes(const BoxPairs& p, int64_t dim) {
  return dim == 2 ? Sizes{p.n, p.m} : Sizes{p.batch, p.n, p.m};
}

// dy must have a pairwise result's shape and dtype.
inline void check_pair_gradient(const char* op, const Array& dy, const BoxPairs& p, int64_t dim) {
  const Sizes sizes = pair_sizes(p, dim);
  STD_TORCH_CHECK(dy.dtype == host::compute_dtype(p.dtype), op, ": dy must be ",
                  host::name_of(host::compute_dtype(p.dtype)), ", got ", host::name_of(dy.dtype));
  STD_TORCH_CHECK(dy.dim == dim && std::equal(sizes.begin(), sizes.end(), dy.sizes), op,
                  ": dy must have the shape of the result, [", p.n, ", ", p.m, "] for each set of boxes");
}

// The arguments of a loss; both tensors are contiguous.
inline BoxRows box_rows(const char* op, const Array& boxes1, const Array& boxes2, int64_t kind, double eps) {
  check_boxes(op, "boxes1", boxes1);
  check_boxes(op, "boxes2", boxes2);
  check_kind(op, kind);
  STD_TORCH_CHECK(boxes1.dtype == boxes2.dtype, op, ": boxes2 must be ", host::name_of(boxes1.dtype), ", got ",
                  host::name_of(boxes2.dtype));
  STD_TORCH_CHECK(boxes1.dim == boxes2.dim && std::equal(boxes1.sizes, boxes1.sizes + boxes1.dim, boxes2.sizes), op,
                  ": boxes2 must have the shape of boxes1");
  return {boxes1.numel() / 4, boxes1.data, boxes2.data, boxes1.dtype, kind, eps};
}

// The arguments of a function of single boxes, contiguous.
inline BoxRows single_boxes(const char* op, const Array& boxes) {
  check_boxes(op, "boxes", boxes);
  return {boxes.numel() / 4, boxes.data, nullptr, boxes.dtype, 0, 0.0};
}

// `rows` has one value for each box.
inline void check_row_values(const char* op, const char* name, const Array& rows, const Array& boxes) {
  const Dtype dtype = host::compute_dtype(boxes.dtype);
  STD_TORCH_CHECK(rows.dtype == dtype, op, ": ", name, " must be ", host::name_of(dtype), ", got ",
                  host::name_of(rows.dtype));
  STD_TORCH_CHECK(rows.dim == boxes.dim - 1 && std::equal(rows.sizes, rows.sizes + rows.dim, boxes.sizes), op, ": ",
                  name, " must have one value for each box");
}

// Whether every element lies at the same address.
inline bool is_uniform(const Array& rows) {
  return std::all_of(rows.strides, rows.strides + rows.dim, [](int64_t stride) { return stride == 0; });
}

}  // namespace
}  // namespace pydl

#endif

// Runs the statement with KIND bound to a kind of agreement.
#define PYDL_BOX_KIND_SWITCH(kind, ...)             \
  switch (kind) {                                   \
    case ::pydl::kIou: {                            \
      constexpr int KIND = ::pydl::kIou;            \
      __VA_ARGS__;                                  \
    } break;                                        \
    case ::pydl::kGeneralizedIou: {                 \
      constexpr int KIND = ::pydl::kGeneralizedIou; \
      __VA_ARGS__;                                  \
    } break;                                        \
    case ::pydl::kDistanceIou: {                    \
      constexpr int KIND = ::pydl::kDistanceIou;    \
      __VA_ARGS__;                                  \
    } break;                                        \
    default: {                                      \
      constexpr int KIND = ::pydl::kCompleteIou;    \
      __VA_ARGS__;                                  \
    } break;                                        \
  }
