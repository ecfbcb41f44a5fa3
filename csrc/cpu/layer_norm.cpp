// Layer normalisation over the last dimensions, seen as rows of `cols` elements.
//
// Forward: mean, then the squared deviations from that mean (corrected two-pass algorithm: Chan, Golub, LeVeque,
// "Algorithms for computing the sample variance", 1983), then the row is written; rows are read from cache after the
// first pass. Backward, with g = dy * weight and xhat = (x - mean) * rstd:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat,  dbias = sum of dy.
// The rows are cut into chunks that depend on the shape alone; each chunk sums dweight and dbias into its own buffer and
// the buffers are added in order, so results do not depend on threads.

#include "common/isa.h"
#include "common/vec.h"

namespace pydl {

struct LayerNormFwd {
  const void* x;
  const void* weight;  // of the compute type, as all parameters and statistics here; null if absent
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

namespace PYDL_ISA {
namespace {

template <class C>
struct RowMoments {
  C mean;
  C rest;  // what rounding took from the mean
  C rstd;
};

template <class C>
inline C square_root(C value) {
  if constexpr (sizeof(C) == 4) {
    return __builtin_sqrtf(value);
  } else {
    return __builtin_sqrt(value);
  }
}

template <class C>
inline bool is_finite(C value) {
  return value - value == 0;
}

// For rows whose squares or sums leave the range of fp32.
RowMoments<float> moments_in_double(const float* x, int64_t n, double eps) {
  double total = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  const double mean = total / double(n);
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double rstd = 1 / __builtin_sqrt(squares / double(n) + eps);
  return {float(mean), float(mean - float(mean)), float(rstd)};
}

template <class C>
RowMoments<C> row_moments(const C* x, int64_t n, double eps) {
  Vec<C> total[4] = {};
  sweep<C>(n, [&](int64_t i, int slot, auto extent) { total[slot] += load(x + i, extent); });
  const C first = sum(total) / C(n);
  const Vec<C> centre = splat(first);
  Vec<C> rest[4] = {}, squares[4] = {};
  sweep<C>(n, [&](int64_t i, int slot, auto extent) {
    const Vec<C> d = load(x + i, extent, centre) - centre;
    rest[slot] += d;
    squares[slot] += d * d;
  });
  const C correction = sum(rest) / C(n);
  const C variance = sum(squares) / C(n) - correction * correction;
  if constexpr (sizeof(C) == 4) {
    if (!is_finite(first) || !is_finite(variance)) return moments_in_double(x, n, eps);
  }
  const C mean = first + correction;
  return {mean, (first - mean) + correction, C(1) / square_root((variance > 0 ? variance : C(0)) + C(eps))};
}

template <class T, class C>
inline void widen_row(const T* in, C* out, int64_t n) {
  sweep<C>(n, [&](int64_t i, int, auto extent) { store(out + i, load(in + i, extent), extent); });
}

template <class T, class C>
void fwd_rows(const LayerNormFwd& a, C* buffer, int64_t begin, int64_t end) {
  const C *weight = static_cast<const C*>(a.weight), *bias = static_cast<const C*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.row_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    const C* values = buffer;
    if constexpr (is_same<T, C>) {
      values = x;
    } else {
      widen_row(x, buffer, a.cols);
    }
    const RowMoments<C> m = row_moments(values, a.cols, a.eps);
    static_cast<C*>(a.mean)[row] = m.mean;
    static_cast<C*>(a.rstd)[row] = m.rstd;
    const Vec<C> mean = splat(m.mean), rstd = splat(m.rstd), shift = splat(-m.rest * m.rstd);
    sweep<C>(a.cols, [&](int64_t i, int, auto extent) {
      Vec<C> v = (load(values + i, extent) - mean) * rstd + shift;
      if (weight != nullptr) v *= load(weight + i, extent);
      if (bias != nullptr) v += load(bias + i, extent);
      store(y + i, v, extent);
    });
  }
}

// Rows whose sums run side by side, so that a partial sum of dweight and dbias is read and written once for all of them.
inline constexpr int kRowsAtOnce = PYDL_VEC_BYTES == 64 ? 4 : 2;

template <class T, class C, int R>
struct RowBlock {
  const T* dy[R];
  const T* x[R];
  C mean[R], rstd[R];

  RowBlock(const LayerNormBwd& a, int64_t row) {
    for (int r = 0; r < R; ++r) {
      dy[r] = static_cast<const T*>(a.dy) + (row + r) * a.dy_stride;
      x[r] = static_cast<const T*>(a.x) + (row + r) * a.x_stride;
      mean[r] = static_cast<const C*>(a.mean)[row + r];
      rstd[r] = static_cast<const C*>(a.rstd)[row + r];
    }
  }
};

// Adds R rows to the chunk's sums (if PARAMS) and returns sum(g) and sum(g * xhat) of each row.
template <bool PARAMS, class T, class C, int R>
void bwd_sums(const RowBlock<T, C, R>& rows, const C* weight, C* dweight, C* dbias, int64_t n, C (&g_sum)[R],
              C (&gx_sum)[R]) {
  Vec<C> g_total[R] = {}, gx_total[R] = {};
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> w = weight != nullptr ? load(weight + i, extent) : splat(C(1));
    Vec<C> dw = {}, db = {};
    if constexpr (PARAMS) {
      dw = load(dweight + i, extent);
      db = load(dbias + i, extent);
    }
    for (int r = 0; r < R; ++r) {
      const Vec<C> dy = load(rows.dy[r] + i, extent);
      // A missing lane must be exactly zero in xhat too: 0 * inf would leave a NaN.
      const Vec<C> xhat = (load(rows.x[r] + i, extent, splat(rows.mean[r])) - rows.mean[r]) * rows.rstd[r];
      const Vec<C> g = dy * w;
      g_total[r] += g;
      gx_total[r] += g * xhat;
      if constexpr (PARAMS) {
        dw += dy * xhat;
        db += dy;
      }
    }
    if constexpr (PARAMS) {
      store(dweight + i, dw, extent);
      store(dbias + i, db, extent);
    }
  });
  for (int r = 0; r < R; ++r) {
    g_sum[r] = sum(g_total[r]);
    gx_sum[r] = sum(gx_total[r]);
  }
}

template <class T, class C>
void bwd_dx(const T* dy, const T* x, const C* weight, T* dx, int64_t n, C mean, C rstd, C g_mean, C gx_mean) {
  const C slope = rstd * gx_mean, shift = rstd * g_mean;
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> xhat = (load(x + i, extent) - mean) * rstd;
    Vec<C> g = load(dy + i, extent);
    if (weight != nullptr) g *= load(weight + i, extent);
    store(dx + i, (g * rstd - shift) - xhat * slope, extent);
  });
}

template <class T, class C, int R>
void bwd_block(const LayerNormBwd& a, int64_t row, C* dweight, C* dbias) {
  const C* weight = static_cast<const C*>(a.weight);
  const RowBlock<T, C, R> rows(a, row);
  C g_sum[R], gx_sum[R];
  if (dweight != nullptr) {
    bwd_sums<true>(rows, weight, dweight, dbias, a.cols, g_sum, gx_sum);
  } else {
    bwd_sums<false>(rows, weight, dweight, dbias, a.cols, g_sum, gx_sum);
  }
  if (a.dx == nullptr) return;
  for (int r = 0; r < R; ++r) {
    T* dx = static_cast<T*>(a.dx) + (row + r) * a.cols;
    bwd_dx(rows.dy[r], rows.x[r], weight, dx, a.cols, rows.mean[r], rows.rstd[r], g_sum[r] / C(a.cols),
           gx_sum[r] / C(a.cols));
  }
}

template <class T, class C>
void bwd_chunk(const LayerNormBwd& a, int64_t chunk) {
  C* dweight = a.partial != nullptr ? static_cast<C*>(a.partial) + chunk * 2 * a.cols : nullptr;
  C* dbias = dweight != nullptr ? dweight + a.cols : nullptr;
  if (dweight != nullptr) {
    for (int64_t i = 0; i < 2 * a.cols; ++i) dweight[i] = 0;
  }
  int64_t row = chunk * a.chunk_rows;
  const int64_t end = smaller(row + a.chunk_rows, a.rows);
  for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) bwd_block<T, C, kRowsAtOnce>(a, row, dweight, dbias);
  for (; row < end; ++row) bwd_block<T, C, 1>(a, row, dweight, dbias);
}

template <class T, class C>
void reduce_columns(const C* partial, int64_t chunks, int64_t stride, T* out, int64_t begin, int64_t end) {
  sweep<C>(end - begin, [&](int64_t i, int, auto extent) {
    Vec<C> total = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += load(partial + chunk * stride + begin + i, extent);
    store(out + begin + i, total, extent);
  });
}

}  // namespace

// Rows [begin, end); `buffer` holds one row of the compute type.
void layer_norm_fwd_rows(const LayerNormFwd& a, void* buffer, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, fwd_rows<T>(a, static_cast<compute_t<T>*>(buffer), begin, end));
}

void layer_norm_bwd_chunks(const LayerNormBwd& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    PYDL_FLOAT_SWITCH(a.dtype, bwd_chunk<T, compute_t<T>>(a, chunk));
  }
}

// out[j] = sum over chunks of partial[chunk * stride + j], for columns [begin, end).
void layer_norm_reduce(const void* partial, int64_t chunks, int64_t stride, void* out, Dtype dtype, int64_t begin,
                       int64_t end) {
  PYDL_FLOAT_SWITCH(dtype, reduce_columns(static_cast<const compute_t<T>*>(partial), chunks, stride,
                                          static_cast<T*>(out), begin, end));
}

// out[i] = in[i] in the compute type.
void layer_norm_widen(const void* in, Dtype dtype, void* out, int64_t n) {
  PYDL_FLOAT_SWITCH(dtype, widen_row(static_cast<const T*>(in), static_cast<compute_t<T>*>(out), n));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

#include "common/host.h"

namespace pydl {

PYDL_CPU_DECLARE(void, layer_norm_fwd_rows, const LayerNormFwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, layer_norm_bwd_chunks, const LayerNormBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, layer_norm_reduce, const void*, int64_t, int64_t, void*, Dtype, int64_t, int64_t)
PYDL_CPU_DECLARE(void, layer_norm_widen, const void*, Dtype, void*, int64_t)

namespace {

using namespace host;

struct Split {
  int64_t rows, cols, outer;  // outer: number of dimensions before the normalised ones
};

Split split_rows(const char* op, const Array& x, const Sizes& shape) {
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

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Sizes& normalized_shape,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  const char* const op = "layer_norm_fwd";
  const Array meta(x);
  const Split split = split_rows(op, meta, normalized_shape);
  const Dtype compute = compute_dtype(meta.dtype);
  const Operand w(op, "weight", weight, split.cols, meta.dtype, compute);
  const Operand b(op, "bias", bias, split.cols, meta.dtype, compute);
  Output y = empty(meta.sizes, meta.dim, meta.dtype);
  Output mean = empty(meta.sizes, split.outer, compute);
  Output rstd = empty(meta.sizes, split.outer, compute);
  if (split.rows > 0) {
    const Rows rows(x, split.outer);
    const LayerNormFwd args{rows.array.data, w.data, b.data, y.data, mean.data,
                            rstd.data, split.cols, rows.stride, eps, meta.dtype};
    parallel(split.rows, split.cols, [&](int64_t begin, int64_t end) {
      const Scratch buffer(compute == meta.dtype ? 0 : split.cols * size_of(compute));
      PYDL_CPU_DISPATCH(layer_norm_fwd_rows)(args, buffer.get(), begin, end);
    });
  }
  return {std::move(y.tensor), std::move(mean.tensor), std::move(rstd.tensor)};
}

// Rows per partial sum: at least 8 chunks where there are rows for them, 16 rows in each where possible, at most 64
// chunks. Depends on nothing but the shape, so neither does the order of the sums.
int64_t rows_per_chunk(int64_t rows, int64_t cols) {
  if (rows * cols <= 32768) return rows;
  const int64_t eighth = (rows + 7) / 8, sixtyfourth = (rows + 63) / 64;
  return std::max(std::min<int64_t>(16, eighth), sixtyfourth);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const Sizes& normalized_shape,
                                                  const Tensor& mean, const Tensor& rstd,
                                                  const std::optional<Tensor>& weight,
                                                  const std::vector<bool>& output_mask) {
  const char* const op = "layer_norm_bwd";
  const Array meta(x), dy_meta(dy);
  const Split split = split_rows(op, meta, normalized_shape);
  STD_TORCH_CHECK(output_mask.size() == 3, op, ": output_mask must have 3 entries, got ", output_mask.size());
  STD_TORCH_CHECK(dy_meta.dtype == meta.dtype, op, ": dy must be ", name_of(meta.dtype), " as x, got ",
                  name_of(dy_meta.dtype));
  STD_TORCH_CHECK(dy_meta.dim == meta.dim && std::equal(dy_meta.sizes, dy_meta.sizes + meta.dim, meta.sizes), op,
                  ": dy must have the shape of x");
  const Dtype compute = compute_dtype(meta.dtype);
  const Dtype param = weight.has_value() ? Array(*weight).dtype : meta.dtype;
  const Operand w(op, "weight", weight, split.cols, meta.dtype, compute);
  const Operand mu(op, "mean", mean, split.rows, compute, compute);
  const Operand rs(op, "rstd", rstd, split.rows, compute, compute);

  const int64_t none = 0, *inner = meta.sizes + split.outer, inner_dim = meta.dim - split.outer;
  Output dx = output_mask[0] ? empty(meta.sizes, meta.dim, meta.dtype) : empty(&none, 1, meta.dtype);
  Output dweight = output_mask[1] ? empty(inner, inner_dim, param) : empty(&none, 1, meta.dtype);
  Output dbias = output_mask[2] ? empty(inner, inner_dim, param) : empty(&none, 1, meta.dtype);
  const bool params = output_mask[1] || output_mask[2];
  if (split.cols > 0 && (params || output_mask[0])) {
    const int64_t chunk_rows = rows_per_chunk(split.rows, split.cols);
    const int64_t chunks = split.rows == 0 ? 0 : (split.rows + chunk_rows - 1) / chunk_rows;
    const Scratch partial(params ? chunks * 2 * split.cols * size_of(compute) : 0);
    if (chunks > 0) {
      const Rows dy_rows(dy, split.outer), x_rows(x, split.outer);
      const LayerNormBwd args{dy_rows.array.data, x_rows.array.data, mu.data, rs.data, w.data,
                              output_mask[0] ? dx.data : nullptr, partial.get(), split.rows, split.cols,
                              dy_rows.stride, x_rows.stride, chunk_rows, meta.dtype};
      parallel(chunks, chunk_rows * split.cols,
               [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(layer_norm_bwd_chunks)(args, begin, end); });
    }
    const auto reduce = [&](Output& out, int64_t offset) {
      const char* from = partial.get<char>() + offset * size_of(compute);
      parallel(split.cols, chunks, [&](int64_t begin, int64_t end) {
        PYDL_CPU_DISPATCH(layer_norm_reduce)(from, chunks, 2 * split.cols, out.data, param, begin, end);
      });
    };
    if (output_mask[1]) reduce(dweight, 0);
    if (output_mask[2]) reduce(dbias, split.cols);
  }
  return {std::move(dx.tensor), std::move(dweight.tensor), std::move(dbias.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace
}  // namespace pydl

#endif
