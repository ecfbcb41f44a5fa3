// Runs of equal values in rows: once over the memory to count them, once to write them. A run of bytes is skipped eight
// at a time.
#include <stdint.h>

#include "common/isa.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

int64_t end_of_run(const int64_t* row, int64_t begin, int64_t length) {
  int64_t i = begin + 1;
  while (i < length && row[i] == row[begin]) ++i;
  return i;
}

int64_t end_of_run(const uint8_t* row, int64_t begin, int64_t length) {
  const uint64_t all = 0x0101010101010101u * row[begin];
  int64_t i = begin + 1;
  for (; i + 8 <= length; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, row + i, 8);
    if (eight != all) return i + __builtin_ctzll(eight ^ all) / 8;
  }
  while (i < length && row[i] == row[begin]) ++i;
  return i;
}

// Calls run(first, count) for each run. With `zero_first` a row that begins with another value has an empty run of 0.
template <class T, class F>
int64_t runs_of(const T* row, int64_t length, bool zero_first, F run) {
  int64_t runs = 0;
  if (zero_first && length > 0 && row[0] != 0) run(runs++, T(0), int64_t(0));
  for (int64_t begin = 0; begin < length;) {
    int64_t end = end_of_run(row, begin, length);
    run(runs++, row[begin], end - begin);
    begin = end;
  }
  return runs;
}

}  // namespace

template <class T>
static int64_t write_or_count(const void* row, int64_t length, bool zero_first, int64_t* values, int64_t* counts) {
  return runs_of(static_cast<const T*>(row), length, zero_first, [&](int64_t i, T value, int64_t count) {
    if (counts == nullptr) return;
    values[i] = int64_t(value);
    counts[i] = count;
  });
}

// The number of runs of a row; values and counts are written unless they are null.
int64_t rle_row(const void* row, bool bytes, int64_t length, bool zero_first, int64_t* values, int64_t* counts) {
  return bytes ? write_or_count<uint8_t>(row, length, zero_first, values, counts)
               : write_or_count<int64_t>(row, length, zero_first, values, counts);
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0
#include "common/host.h"

namespace pydl {
PYDL_CPU_DECLARE(int64_t, rle_row, const void*, bool, int64_t, bool, int64_t*, int64_t*)
namespace {
using namespace host;

std::tuple<Tensor, Tensor, Tensor> rle_encode(const Tensor& x_in, bool zero_first) {
  const Tensor x = as_contiguous(x_in);
  const Array meta(x);
  STD_TORCH_CHECK(meta.dim == 2, "rle_encode: x must have shape [N, L]");
  const bool bytes = meta.dtype == Dtype::kUInt8;
  STD_TORCH_CHECK(bytes || meta.dtype == Dtype::kInt64, "rle_encode: x must be uint8 or int64");
  const int64_t n = meta.sizes[0], length = meta.sizes[1], row_bytes = length * size_of(meta.dtype);
  const char* const data = static_cast<const char*>(meta.data);
  Output lengths = empty(&n, 1, Dtype::kInt64);
  int64_t* const runs = static_cast<int64_t*>(lengths.data);
  parallel(n, length, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      runs[i] = PYDL_CPU_DISPATCH(rle_row)(data + i * row_bytes, bytes, length, zero_first, nullptr, nullptr);
    }
  });
  Sizes starts(size_t(n) + 1, 0);
  for (int64_t i = 0; i < n; ++i) starts[size_t(i) + 1] = starts[size_t(i)] + runs[i];
  const int64_t total = starts[size_t(n)];
  Output values = empty(&total, 1, Dtype::kInt64), counts = empty(&total, 1, Dtype::kInt64);
  parallel(n, length, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = starts[size_t(i)];
      PYDL_CPU_DISPATCH(rle_row)
      (data + i * row_bytes, bytes, length, zero_first, static_cast<int64_t*>(values.data) + at,
       static_cast<int64_t*>(counts.data) + at);
    }
  });
  return {std::move(values.tensor), std::move(counts.tensor), std::move(lengths.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("rle_encode", TORCH_BOX(&rle_encode)); }
}  // namespace
}  // namespace pydl
#endif
