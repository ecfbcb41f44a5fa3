// Group normalisation, forward (Wu and He, "Group normalization", 2018), with an optional activation behind it:
// y = act((x - mean) * rstd * weight + bias), mean and rstd of each group of channels of each sample. Instance
// normalisation is the same with one channel per group.
#include "cuda/group_norm.h"

namespace pydl {
namespace {

template <typename T>
struct Forward {
  using A = acc_t<T>;
  struct Constants {
    A mean, scale, shift;
  };

  const T* x;
  T* y;
  GroupShape s;
  const A* table;  // of each group mean, rstd, and what rounding took from the mean, times -rstd
  NormParameter weight, bias;
  int activation;

  __device__ __forceinline__ Constants constants(int64_t n, int64_t c) const {
    int64_t all = s.all_groups();
    const A* of_group = table + n * s.groups + s.group_of(c);
    A w = read_parameter(weight, c, A(1)), b = read_parameter(bias, c, A(0));
    return {of_group[0], of_group[all] * w, of_group[2 * all] * w + b};
  }

  template <int V, int STEP>
  __device__ __forceinline__ void apply(int64_t offset, const Constants* k) const {
    A values[V];
    load_values<V>(x + offset, values);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Constants& of = k[j * STEP];
      values[j] = activate((values[j] - of.mean) * of.scale + of.shift, activation);
    }
    store_values<V>(y + offset, values);
  }
};

void statistics(const GroupCall& f, const Dense& x, const NormFinal& final, const DeviceGuard& guard) {
  const GroupShape& s = f.shape;
  if (s.rows) {
    const GroupSplit split = split_of(s, group_packs(s, {x.data}));
    const Output partial = norm_vector(guard, s.samples * split.splits * 3 * s.channels, f.norm.compute());
    launch_group_statistics(f.norm.op, x.data, f.norm.dtype, s, split, partial.data, final, guard.stream());
    return;
  }
  const Channels shape{1, s.all_groups(), s.width * s.inner};
  const NormSplit split = split_of(shape, may_pack(shape, {x.data}));
  const Output partial =
      norm_vector(guard, split.splits > 1 ? int64_t(split.splits) * 3 * shape.channels : 0, f.norm.compute());
  launch_norm_statistics(f.norm.op, x.data, f.norm.dtype, shape, split, partial.data, final, guard.stream());
}

std::tuple<Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& x_in, int64_t groups,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, int64_t activation, double eps) {
  const Array meta(x_in);
  const GroupCall f("group_norm_fwd", meta, groups, activation);
  const DeviceGuard guard(x_in);
  const GroupShape& s = f.shape;
  const NormOperand w(f.norm.op, "weight", weight, s.channels, guard), b(f.norm.op, "bias", bias, s.channels, guard);
  const int64_t sizes[2] = {s.samples, s.groups}, strides[2] = {s.groups, 1};
  Output mean = guard.empty_strided(sizes, strides, 2, f.norm.compute());
  Output var = guard.empty_strided(sizes, strides, 2, f.norm.compute());
  Output y = norm_like(guard, f.norm.layout, f.norm.dtype);
  if (s.numel() == 0) {
    for (const Output* out : {&mean, &var}) clear(guard, *out, s.all_groups() * host::size_of(f.norm.compute()));
    return {std::move(y.tensor), std::move(mean.tensor), std::move(var.tensor)};
  }
  const Dense x = f.norm.layout.dense_in(f.norm.op, "x", x_in, meta, f.norm.dtype);
  const Output table = norm_vector(guard, 3 * s.all_groups(), f.norm.compute());
  statistics(f, x, {{}, {}, mean.data, var.data, table.data, eps}, guard);
  PYDL_CUDA_FLOAT_SWITCH(f.norm.dtype, {
    const Forward<T> map{static_cast<const T*>(x.data),
                         static_cast<T*>(y.data),
                         s,
                         static_cast<const acc_t<T>*>(table.data),
                         w.value,
                         b.value,
                         f.activation};
    launch_map(f.norm.op, map, s, group_packs(s, {x.data, y.data}), guard.stream());
  });
  return {std::move(y.tensor), std::move(mean.tensor), std::move(var.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("group_norm_fwd", TORCH_BOX(&group_norm_fwd)); }

}  // namespace pydl
