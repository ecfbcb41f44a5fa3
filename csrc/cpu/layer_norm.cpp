// Layer normalisation over the last dimensions, forward, seen as rows of `cols` elements. Mean and variance are found
// in one pass over shifted data (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983), in a
// second if the shift was poor; then the row, by now in cache, is read again and written.

#include "cpu/layer_norm.h"

#include "common/vec.h"

namespace pydl {
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

// Mean of x - centre, and from it the variance. Long rows are summed block by block, so that rounding grows with the
// number of blocks and not of elements.
template <class C>
struct Deviation {
  C mean, variance;
};
template <class C>
Deviation<C> deviation(const C* x, int64_t n, C centre) {
  Vec<C> total = {}, squares = {};
  for (int64_t start = 0; start < n; start += kSumBlock) {
    Vec<C> block_total[4] = {}, block_squares[4] = {};
    sweep<C>(smaller(kSumBlock, n - start), [&](int64_t i, int slot, auto extent) {
      const Vec<C> d = load(x + start + i, extent, splat(centre)) - centre;
      block_total[slot] += d;
      block_squares[slot] += d * d;
    });
    total += add_up(block_total);
    squares += add_up(block_squares);
  }
  const C mean = sum(total) / C(n);
  return {mean, sum(squares) / C(n) - mean * mean};
}

// Deviations are taken from the mean of the first elements. Where that turns out to be further from the mean than a
// standard deviation, digits of the variance have cancelled, and it is taken again from what is now known of the mean.
template <class C>
RowMoments<C> row_moments(const C* x, int64_t n, double eps) {
  const int64_t head = smaller(n, 64);
  Vec<C> first[4] = {};
  sweep<C>(head, [&](int64_t i, int slot, auto extent) { first[slot] += load(x + i, extent); });
  C centre = sum(add_up(first)) / C(head);
  Deviation<C> d = deviation(x, n, centre);
  if (d.mean * d.mean > d.variance) {
    centre += d.mean;
    d = deviation(x, n, centre);
  }
  if constexpr (sizeof(C) == 4) {
    if (!is_finite(centre + d.mean) || !is_finite(d.variance)) return moments_in_double(x, n, eps);
  }
  const C mean = centre + d.mean;
  return {mean, (centre - mean) + d.mean, C(1) / square_root((d.variance > 0 ? d.variance : C(0)) + C(eps))};
}

// RMS normalisation: the mean square, of rows whose squares leave the range of fp32 in double.
template <class C>
RowMoments<C> mean_square(const C* x, int64_t n, double eps) {
  Vec<C> squares = {};
  for (int64_t start = 0; start < n; start += kSumBlock) {
    Vec<C> block[4] = {};
    sweep<C>(smaller(kSumBlock, n - start), [&](int64_t i, int slot, auto extent) {
      const Vec<C> v = load(x + start + i, extent);
      block[slot] += v * v;
    });
    squares += add_up(block);
  }
  C mean = sum(squares) / C(n);
  if constexpr (sizeof(C) == 4) {
    if (!is_finite(mean)) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += double(x[i]) * x[i];
      return {0, 0, C(1 / __builtin_sqrt(total / double(n) + eps))};
    }
  }
  return {0, 0, C(1) / square_root(mean + C(eps))};
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
    const RowMoments<C> m = a.mean != nullptr ? row_moments(values, a.cols, a.eps) : mean_square(values, a.cols, a.eps);
    if (a.mean != nullptr) static_cast<C*>(a.mean)[row] = m.mean;
    static_cast<C*>(a.rstd)[row] = m.rstd;
    // While this row is written memory has time for the next one, if the second-nearest cache has room for both.
    const bool fetch = a.cols * int64_t(sizeof(T)) <= 262144;
    const Vec<C> mean = splat(m.mean), rstd = splat(m.rstd), shift = splat(-m.rest * m.rstd);
    sweep<C>(a.cols, [&](int64_t i, int, auto extent) {
      if (fetch) __builtin_prefetch(x + a.row_stride + i, 0, 2);
      Vec<C> v = (load(values + i, extent) - mean) * rstd + shift;
      if (weight != nullptr) v *= load(weight + i, extent);
      if (bias != nullptr) v += load(bias + i, extent);
      store(y + i, v, extent);
    });
  }
}

}  // namespace

// Rows [begin, end); `buffer` holds one row of the compute type.
void layer_norm_fwd_rows(const LayerNormFwd& a, void* buffer, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, fwd_rows<T>(a, static_cast<compute_t<T>*>(buffer), begin, end));
}

// out[i] = in[i] in the compute type.
void layer_norm_widen(const void* in, Dtype dtype, void* out, int64_t n) {
  PYDL_FLOAT_SWITCH(dtype, widen_row(static_cast<const T*>(in), static_cast<compute_t<T>*>(out), n));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

namespace {

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
    const LayerNormFwd args{rows.array.data, w.data,     b.data,      y.data, mean.data,
                            rstd.data,       split.cols, rows.stride, eps,    meta.dtype};
    run_rows(args, split.rows, compute);
  }
  return {std::move(y.tensor), std::move(mean.tensor), std::move(rstd.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd)); }

}  // namespace
}  // namespace pydl

#endif
