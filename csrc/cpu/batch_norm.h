// What the files of batch normalisation share. The first part is plain data and is compiled at every ISA level.
//
// Planes (contiguous layout) are cut into pieces, and the pieces of a channel are grouped into chunks whose statistics
// are merged in order. Rows (channels last) are laid side by side until a wide row fills whole vectors; wide rows are
// grouped into chunks likewise. The cuts depend on the shape alone, so the threads do not show in the results.
#pragma once

#include <stdint.h>

#include "common/channels.h"

namespace pydl {

struct Cut {
  // planes: elements of a piece, pieces of a plane, pieces of a channel, pieces of a chunk
  int64_t piece, pieces, items, chunk_items;
  // rows: elements of a wide row, how many are full, elements of a last, shorter one, full rows of a chunk
  int64_t width, full, rest, chunk_rows;
  // chunks of a channel, or of full wide rows; a shorter row is a chunk of its own
  int64_t chunks;
};

// One value per channel, of a floating dtype; absent if data is null.
struct Parameter {
  const void* data;
  Dtype dtype;
};

struct BatchNorm {
  Channels shape;
  Cut cut;
  const void *x, *residual;  // residual: null if absent
  void* y;
  uint8_t* mask;  // where y is above 0; null if not wanted
  bool relu;
  Parameter weight, bias;
  Parameter mean, var;       // given statistics
  void *out_mean, *out_var;  // in the compute type; null where statistics are given
  double* partial;           // of each chunk the means, then the sums of squares around them
  void* coefficients;        // in the compute type: see kCoefficients
  double eps;
  Dtype dtype;
};

struct BatchNormBwd {
  Channels shape;
  Cut cut;
  const void *dy, *x;
  const uint8_t* mask;  // null if there was no activation
  Parameter weight, mean, var;
  Parameter mean_dy_xhat, mean_dy;  // given sums, divided by the number of values; absent if they are to be found
  void *dx, *dresidual;             // null if not wanted
  void *dweight, *dbias;            // in the compute type; null if not wanted
  double* partial;                  // of each chunk the sums of dy, then of dy * (x - mean)
  void* coefficients;
  bool training;
  double eps;
  Dtype dtype;
};

// Rows of the coefficients' table, which is as wide as a wide row, or as there are channels.
// Forward: y = (x - mean) * scale + shift. Backward: dx = (dy - along - (x - mean) * slope) * scale.
inline constexpr int64_t kCoefficients = 4;

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {
namespace {

using namespace host;

// Whether a thread takes whole channels of planes, whose values are then in its cache for the second pass. Fewer than
// 32 leave threads without one: then the planes are dealt out instead. Either way the sums are the same.
inline bool by_channel(const Channels& s) {
  return !s.rows() && (s.channels >= 32 || torch::stable::get_num_threads() == 1);
}

inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Cut cut_of(const Channels& s) {
  constexpr int64_t kPiece = 16384, kRowChunk = 65536, kWide = 64, kWidest = 4096, kMostRows = 512;
  Cut cut{};
  if (s.rows()) {
    int64_t fold = 1;
    while (s.channels * fold % kWide != 0) fold *= 2;
    if (s.channels * fold > kWidest) {
      fold = 1;
      while (s.channels * fold % 8 != 0) fold *= 2;  // rows of the mask must begin with a byte
    }
    cut.width = s.channels * fold;
    cut.full = s.outer / fold;
    cut.rest = (s.outer - cut.full * fold) * s.channels;
    cut.chunk_rows = std::clamp<int64_t>(kRowChunk / cut.width, 8, kMostRows);
    cut.chunks = ceil_of(cut.full, cut.chunk_rows);
  } else {
    cut.piece = std::clamp<int64_t>(s.inner, 1, kPiece);
    cut.pieces = ceil_of(s.inner, cut.piece);
    cut.items = s.outer * cut.pieces;
    cut.chunk_items = std::max<int64_t>(1, kPiece / cut.piece);
    cut.chunks = ceil_of(cut.items, cut.chunk_items);
    cut.width = s.channels;
  }
  return cut;
}

// Doubles that the statistics of all chunks take.
inline int64_t partial_size(const Channels& s, const Cut& cut) {
  return 2 * (s.rows() ? (cut.chunks + (cut.rest > 0)) * cut.width : cut.chunks * s.channels);
}

// A parameter as contiguous memory; keeps a copy alive.
struct Operand {
  Operand(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels) {
    if (t.has_value()) *this = Operand(op, name, *t, channels);
  }
  Operand(const char* op, const char* name, const Tensor& t, int64_t channels) {
    const Array array(t);
    STD_TORCH_CHECK(array.numel() == channels, op, ": ", name, " must have ", channels, " elements, got ",
                    array.numel());
    STD_TORCH_CHECK(is_floating(array.dtype), op, ": ", name, " must be floating point");
    value = {array.data, array.dtype};
    if (array.contiguous()) return;
    copy = torch::stable::contiguous(t);
    value.data = Array(*copy).data;
  }

  std::optional<Tensor> copy;
  Parameter value{nullptr, Dtype::kFloat};
};

template <class Call>
inline Call describe(const char* op, const Array& x, const Layout& layout, double eps) {
  STD_TORCH_CHECK(is_floating(x.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  Call a{};
  a.shape = layout.channels();
  a.cut = cut_of(a.shape);
  a.eps = eps;
  a.dtype = x.dtype;
  return a;
}

inline Output empty_like(const Layout& layout, Dtype dtype) {
  return empty_strided(layout.sizes, layout.strides, layout.dim, dtype);
}
inline Output empty_vector(int64_t n, Dtype dtype) { return empty(&n, 1, dtype); }

}  // namespace
}  // namespace pydl

#endif
