// What kernels of channel statistics share: [N, C, *] as it lies in memory. The first part is plain data and is
// compiled at every ISA level.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

// Element (o, c, i) lies at (o * channels + c) * inner + i. Contiguous tensors are planes, inner > 1; channels-last and
// two-dimensional ones are rows of channels, inner == 1. A single channel is one plane, whatever its strides.
struct Channels {
  int64_t outer, channels, inner;

  bool rows() const { return inner == 1 && channels > 1; }
  int64_t numel() const { return outer * channels * inner; }
  int64_t per_channel() const { return outer * inner; }
  // Bytes of one bit per element: each plane begins with a byte of its own, rows follow one another without gaps.
  int64_t mask_bytes() const { return rows() ? (outer * channels + 7) / 8 : outer * channels * ((inner + 7) / 8); }
};

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

#include "common/host.h"

namespace pydl {
namespace {

using host::Array;
using host::Output;
using host::Tensor;

// torch's choice of memory format: channels_last (4 or 5 dimensions) if the strides descend in the order N, *, C.
inline bool strides_of_channels_last(const Array& x) {
  if ((x.dim != 4 && x.dim != 5) || x.strides[1] == 0) return false;
  int64_t least = 0;
  for (int64_t step = 0; step < x.dim; ++step) {
    const int64_t d = step == 0 ? 1 : step + 1 == x.dim ? 0 : x.dim - step;
    if (x.sizes[d] == 0 || x.strides[d] < least) return false;
    if (d == 0 && least == x.strides[1]) return false;  // N,1,1,1 and the like: ambiguous, taken as contiguous
    least = x.strides[d] * (x.sizes[d] > 1 ? x.sizes[d] : 1);
  }
  return true;
}

// A tensor whose memory has no gaps, kept alive beside its address.
struct Dense {
  Tensor tensor;
  void* data;
};

// A shape and the memory format in which all its tensors are read and written.
struct Layout {
  Layout(const char* op, const Array& x) : dim(x.dim), last(strides_of_channels_last(x)) {
    STD_TORCH_CHECK(dim >= 2 && dim <= kMost, op, ": x must have 2 to ", kMost, " dimensions, got ", dim);
    std::copy(x.sizes, x.sizes + dim, sizes);
    int64_t expected = 1;
    for (int64_t step = 0; step < dim; ++step) {
      const int64_t d = axis(step);
      strides[d] = expected;
      expected *= sizes[d] > 1 ? sizes[d] : 1;
    }
  }

  // The step-th axis from the innermost outwards.
  int64_t axis(int64_t step) const {
    if (!last) return dim - 1 - step;
    return step == 0 ? 1 : step + 1 == dim ? 0 : dim - step;
  }

  Channels channels() const {
    int64_t inner = 1;
    for (int64_t d = 2; d < dim; ++d) inner *= sizes[d];
    if (sizes[1] == 1) return {1, 1, sizes[0] * inner};
    return last ? Channels{sizes[0] * inner, sizes[1], 1} : Channels{sizes[0], sizes[1], inner};
  }

  bool dense(const Array& t) const {
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && t.strides[d] != strides[d]) return false;
    }
    return true;
  }

  // The tensor in this memory format, itself or a copy. Its shape and dtype must be x's.
  Dense dense_in(const char* op, const char* name, const Tensor& t, const Array& array, Dtype dtype) const {
    STD_TORCH_CHECK(array.dtype == dtype, op, ": ", name, " must be ", host::name_of(dtype), " as x, got ",
                    host::name_of(array.dtype));
    STD_TORCH_CHECK(array.dim == dim && std::equal(sizes, sizes + dim, array.sizes), op, ": ", name,
                    " must have the shape of x");
    if (dense(array)) return {t, array.data};
    using host::MemoryFormat;
    const auto format = !last      ? MemoryFormat::Contiguous
                        : dim == 4 ? MemoryFormat::ChannelsLast
                                   : MemoryFormat::ChannelsLast3d;
    Tensor copy = torch::stable::contiguous(t, format);
    void* data = Array(copy).data;
    return {std::move(copy), data};
  }
  Dense dense_in(const char* op, const char* name, const Tensor& t, Dtype dtype) const {
    return dense_in(op, name, t, Array(t), dtype);
  }

  static constexpr int64_t kMost = 16;
  int64_t dim;
  bool last;
  int64_t sizes[kMost], strides[kMost];
};

}  // namespace
}  // namespace pydl

#endif
