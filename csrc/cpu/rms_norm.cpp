// RMS normalisation over the last dimensions (Zhang and Sennrich, "Root mean square layer normalization", 2019):
// y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps). The kernels are those of layer normalisation without a
// mean.

#include "cpu/layer_norm.h"

#if PYDL_ISA_LEVEL == 0

namespace pydl {
namespace {

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Sizes& normalized_shape,
                                        const std::optional<Tensor>& weight, double eps) {
  const char* const op = "rms_norm_fwd";
  const Array meta(x);
  const Split split = split_rows(op, meta, normalized_shape);
  const Dtype compute = compute_dtype(meta.dtype);
  const Operand w(op, "weight", weight, split.cols, meta.dtype, compute);
  Output y = empty(meta.sizes, meta.dim, meta.dtype), rstd = empty(meta.sizes, split.outer, compute);
  if (split.rows > 0) {
    const Rows rows(x, split.outer);
    run_rows({rows.array.data, w.data, nullptr, y.data, nullptr, rstd.data, split.cols, rows.stride, eps, meta.dtype},
             split.rows, compute);
  }
  return {std::move(y.tensor), std::move(rstd.tensor)};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const Sizes& normalized_shape,
                                        const Tensor& rstd, const std::optional<Tensor>& weight,
                                        const std::vector<bool>& output_mask) {
  const char* const op = "rms_norm_bwd";
  const Array meta(x), dy_meta(dy);
  const Split split = split_rows(op, meta, normalized_shape);
  STD_TORCH_CHECK(output_mask.size() == 2, op, ": output_mask must have 2 entries, got ", output_mask.size());
  check_gradient(op, dy_meta, meta);
  const Dtype compute = compute_dtype(meta.dtype);
  const Dtype param = weight.has_value() ? Array(*weight).dtype : meta.dtype;
  const Operand w(op, "weight", weight, split.cols, meta.dtype, compute);
  const Operand rs(op, "rstd", rstd, split.rows, compute, compute);

  const int64_t none = 0;
  Output dx = output_mask[0] ? empty(meta.sizes, meta.dim, meta.dtype) : empty(&none, 1, meta.dtype);
  Output dweight =
      output_mask[1] ? empty(meta.sizes + split.outer, meta.dim - split.outer, param) : empty(&none, 1, meta.dtype);
  const Rows dy_rows(dy, split.outer), x_rows(x, split.outer);
  run_backward({dy_rows.array.data, x_rows.array.data, nullptr, rs.data, w.data, output_mask[0] ? dx.data : nullptr,
                nullptr, split.rows, split.cols, dy_rows.stride, x_rows.stride, 0, meta.dtype},
               compute, param, output_mask[1] ? dweight.data : nullptr, nullptr);
  return {std::move(dx.tensor), std::move(dweight.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace
}  // namespace pydl

#endif
