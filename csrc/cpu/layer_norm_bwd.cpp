// Layer normalisation, backward. With g = dy * weight and xhat = (x - mean) * rstd:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat,  dbias = sum of dy.
// The rows are cut into chunks that depend on the shape alone; each chunk sums dweight and dbias into its own buffer
// and the buffers are added in order, so results do not depend on threads. Without a mean, mean(g) is dropped as well.

#include "common/vec.h"
#include "cpu/layer_norm.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

// From here on four rows run side by side, so that the partial sums of dweight and dbias, which no longer stay in the
// nearest cache, are read and written once for the four. Shorter rows are faster one by one: memory is read in order.
inline constexpr int64_t kLongRow = 2048;

template <class T, class C, int R>
struct RowBlock {
  const T* dy[R];
  const T* x[R];
  C mean[R], rstd[R];

  RowBlock(const LayerNormBwd& a, int64_t row) {
    for (int r = 0; r < R; ++r) {
      dy[r] = static_cast<const T*>(a.dy) + (row + r) * a.dy_stride;
      x[r] = static_cast<const T*>(a.x) + (row + r) * a.x_stride;
      mean[r] = a.mean != nullptr ? static_cast<const C*>(a.mean)[row + r] : C(0);
      rstd[r] = static_cast<const C*>(a.rstd)[row + r];
    }
  }
};

// Adds R rows to the chunk's sums (if PARAMS) and returns sum(g) and sum(g * xhat) of each row.
template <bool PARAMS, class T, class C, int R>
void bwd_sums(const RowBlock<T, C, R>& rows, const C* weight, C* dweight, C* dbias, int64_t n, C (&g_sum)[R],
              C (&gx_sum)[R]) {
  Vec<C> g_total[R] = {}, gx_total[R] = {};
  for (int64_t start = 0; start < n; start += kSumBlock) {
    Vec<C> g_block[R] = {}, gx_block[R] = {};
    sweep<C>(smaller(kSumBlock, n - start), [&](int64_t at, int, auto extent) {
      const int64_t i = start + at;
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
        g_block[r] += g;
        gx_block[r] += g * xhat;
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
      g_total[r] += g_block[r];
      gx_total[r] += gx_block[r];
    }
  }
  for (int r = 0; r < R; ++r) {
    g_sum[r] = sum(g_total[r]);
    gx_sum[r] = sum(gx_total[r]);
  }
}

template <class T, class C>
void bwd_dx(const T* dy, const T* x, const C* weight, T* dx, int64_t n, C mean, C rstd, C g_mean, C gx_mean) {
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> xhat = (load(x + i, extent) - mean) * rstd;
    Vec<C> g = load(dy + i, extent);
    if (weight != nullptr) g *= load(weight + i, extent);
    // In this order equal terms cancel exactly, as they must in rows of one or two elements.
    store(dx + i, ((g - g_mean) - xhat * gx_mean) * rstd, extent);
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
    const C g_mean = a.mean != nullptr ? g_sum[r] / C(a.cols) : C(0);
    bwd_dx(rows.dy[r], rows.x[r], weight, dx, a.cols, rows.mean[r], rows.rstd[r], g_mean, gx_sum[r] / C(a.cols));
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
  if (a.cols >= kLongRow) {
    for (; row + 4 <= end; row += 4) bwd_block<T, C, 4>(a, row, dweight, dbias);
  }
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

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const Sizes& normalized_shape,
                                                  const Tensor& mean, const Tensor& rstd,
                                                  const std::optional<Tensor>& weight,
                                                  const std::vector<bool>& output_mask) {
  const char* const op = "layer_norm_bwd";
  const Array meta(x), dy_meta(dy);
  const Split split = split_rows(op, meta, normalized_shape);
  STD_TORCH_CHECK(output_mask.size() == 3, op, ": output_mask must have 3 entries, got ", output_mask.size());
  check_gradient(op, dy_meta, meta);
  const Dtype compute = compute_dtype(meta.dtype);
  const Dtype param = weight.has_value() ? Array(*weight).dtype : meta.dtype;
  const Operand w(op, "weight", weight, split.cols, meta.dtype, compute);
  const Operand mu(op, "mean", mean, split.rows, compute, compute);
  const Operand rs(op, "rstd", rstd, split.rows, compute, compute);

  const int64_t none = 0, *inner = meta.sizes + split.outer, inner_dim = meta.dim - split.outer;
  Output dx = output_mask[0] ? empty(meta.sizes, meta.dim, meta.dtype) : empty(&none, 1, meta.dtype);
  Output dweight = output_mask[1] ? empty(inner, inner_dim, param) : empty(&none, 1, meta.dtype);
  Output dbias = output_mask[2] ? empty(inner, inner_dim, param) : empty(&none, 1, meta.dtype);
  const Rows dy_rows(dy, split.outer), x_rows(x, split.outer);
  run_backward({dy_rows.array.data, x_rows.array.data, mu.data, rs.data, w.data, output_mask[0] ? dx.data : nullptr,
                nullptr, split.rows, split.cols, dy_rows.stride, x_rows.stride, 0, meta.dtype},
               compute, param, output_mask[1] ? dweight.data : nullptr, output_mask[2] ? dbias.data : nullptr);
  return {std::move(dx.tensor), std::move(dweight.tensor), std::move(dbias.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd)); }

}  // namespace
}  // namespace pydl

#endif
