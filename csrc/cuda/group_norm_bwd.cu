// Group normalisation, backward. With dz the gradient behind the activation, which is found from x once more,
// xhat = (x - mean) * rstd and g = dz * weight:
//   dbias = sum dz,  dweight = sum dz * xhat,  dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd, means over a group.
// The sums read dy and x once, this file's kernel reads them again and writes dx.
#include "cuda/group_norm.h"

namespace pydl {
namespace {

template <typename T>
struct Backward {
  using A = acc_t<T>;
  struct Constants {
    A mean, scale, shift, weight, along, slope, rstd;
  };

  const T *dy, *x;
  T* dx;
  GroupShape s;
  const A *mean, *table;  // table: along, slope, rstd of each group
  NormParameter weight, bias;
  int activation;

  __device__ __forceinline__ Constants constants(int64_t n, int64_t c) const {
    int64_t all = s.all_groups(), i = n * s.groups + s.group_of(c);
    A w = read_parameter(weight, c, A(1)), b = activation == kNone ? A(0) : read_parameter(bias, c, A(0));
    return {mean[i], table[2 * all + i] * w, b, w, table[i], table[all + i], table[2 * all + i]};
  }

  template <int V, int STEP>
  __device__ __forceinline__ void apply(int64_t offset, const Constants* k) const {
    A dz[V], d[V];
    load_values<V>(dy + offset, dz);
    load_values<V>(x + offset, d);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Constants& of = k[j * STEP];
      d[j] -= of.mean;
      dz[j] = through(dz[j], d[j] * of.scale + of.shift, activation);
      // In this order equal terms cancel exactly, as they must where a group has one or two values.
      dz[j] = ((dz[j] * of.weight - of.along) - d[j] * of.slope) * of.rstd;
    }
    store_values<V>(dx + offset, dz);
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& dy_in, const Tensor& x_in, const Tensor& mean,
                                                  const Tensor& var, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, int64_t groups, int64_t activation,
                                                  double eps, const std::vector<bool>& output_mask) {
  const Array meta(x_in);
  const GroupCall f("group_norm_bwd", meta, groups, activation);
  const char* const op = f.norm.op;
  const DeviceGuard guard(x_in);
  const GroupShape& s = f.shape;
  const Dtype compute = f.norm.compute();
  STD_TORCH_CHECK(output_mask.size() == 3, op, ": output_mask must have 3 entries, got ", output_mask.size());
  const NormOperand w(op, "weight", weight, s.channels, guard), b(op, "bias", bias, s.channels, guard);
  const NormOperand mu(op, "mean", mean, s.all_groups(), guard), sigma(op, "var", var, s.all_groups(), guard);
  STD_TORCH_CHECK(mu.value.dtype == compute && sigma.value.dtype == compute, op, ": mean and var must be ",
                  host::name_of(compute));
  guard.check_same(op, "dy", dy_in);
  const Dense x = f.norm.layout.dense_in(op, "x", x_in, meta, f.norm.dtype);
  const Dense dy = f.norm.layout.dense_in(op, "dy", dy_in, f.norm.dtype);
  Output dx = output_mask[0] ? norm_like(guard, f.norm.layout, f.norm.dtype) : norm_vector(guard, 0, f.norm.dtype);
  Output dweight = norm_vector(guard, output_mask[1] ? s.channels : 0, compute);
  Output dbias = norm_vector(guard, output_mask[2] ? s.channels : 0, compute);
  if (s.numel() == 0) {
    if (output_mask[1]) clear(guard, dweight, s.channels * host::size_of(compute));
    if (output_mask[2]) clear(guard, dbias, s.channels * host::size_of(compute));
  } else if (output_mask[0] || output_mask[1] || output_mask[2]) {
    const Output table = norm_vector(guard, 3 * s.all_groups(), compute);
    const GroupSums sums{dy.data,
                         x.data,
                         mu.value.data,
                         sigma.value.data,
                         w.value,
                         b.value,
                         f.activation,
                         table.data,
                         output_mask[1] ? dweight.data : nullptr,
                         output_mask[2] ? dbias.data : nullptr,
                         eps};
    const GroupSplit split = split_of(s, group_packs(s, {dy.data, x.data}));
    const Output partial = norm_vector(guard, s.samples * split.splits * 2 * s.channels, compute);
    launch_group_sums(op, sums, f.norm.dtype, s, split, partial.data, guard.stream());
    if (output_mask[0]) {
      PYDL_CUDA_FLOAT_SWITCH(f.norm.dtype, {
        using A = acc_t<T>;
        const Backward<T> map{static_cast<const T*>(dy.data),
                              static_cast<const T*>(x.data),
                              static_cast<T*>(dx.data),
                              s,
                              static_cast<const A*>(mu.value.data),
                              static_cast<const A*>(table.data),
                              w.value,
                              b.value,
                              f.activation};
        launch_map(op, map, s, group_packs(s, {dy.data, x.data, dx.data}), guard.stream());
      });
    }
  }
  return {std::move(dx.tensor), std::move(dweight.tensor), std::move(dbias.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("group_norm_bwd", TORCH_BOX(&group_norm_bwd)); }

}  // namespace pydl
