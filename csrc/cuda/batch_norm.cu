// Batch normalisation, forward (Ioffe and Szegedy, "Batch normalization", 2015), with an optional addition and relu
// behind it. The statistics read x once, this file's kernels read it again and write y: y = (x - mean) * scale + shift.
#include "cuda/batch_norm.h"

namespace pydl {
namespace {

// ---- kernels

template <typename T>
struct Apply {
  const T *x, *residual;  // residual: null if absent
  T* y;
  uint8_t* mask;  // one bit per element, where y is not 0 or less; null if not wanted
  bool relu;
  const acc_t<T>* table;  // mean, scale, shift
};

// The end of one value; returns whether relu lets its gradient through. NaN passes, as in torch.
template <typename A>
__device__ __forceinline__ bool finish(A& value, bool relu) {
  if (!relu) return true;
  bool passes = !(value <= A(0));
  value = passes ? value : A(0);
  return passes;
}

// 8 elements at `offset`, whose channels begin at `c` of the coefficients and step by STEP.
template <typename T, int STEP>
__device__ __forceinline__ void apply_pack(const Apply<T>& a, int64_t offset, const acc_t<T>* mean,
                                           const acc_t<T>* scale, const acc_t<T>* shift) {
  using A = acc_t<T>;
  A values[kNormPack], other[kNormPack];
  load_values<kNormPack>(a.x + offset, values);
  if (a.residual != nullptr) load_values<kNormPack>(a.residual + offset, other);
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kNormPack; ++j) {
    values[j] = (values[j] - mean[j * STEP]) * scale[j * STEP] + shift[j * STEP];
    if (a.residual != nullptr) values[j] += other[j];
    bits |= unsigned(finish(values[j], a.relu)) << j;
  }
  store_values<kNormPack>(a.y + offset, values);
  if (a.mask != nullptr) a.mask[offset / 8] = uint8_t(bits);
}

// Planes whose size is a multiple of 8, an item of 8 elements per thread.
template <typename T>
__global__ void __launch_bounds__(kNormThreads) batch_norm_planes_kernel(Apply<T> a, Channels s, uint64_t items) {
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t offset = int64_t(item) * kNormPack;
  take_digit(item, int(s.inner / kNormPack));
  int c = take_digit(item, int(s.channels));
  acc_t<T> mean = a.table[c], scale = a.table[s.channels + c], shift = a.table[2 * s.channels + c];
  apply_pack<T, 0>(a, offset, &mean, &scale, &shift);
}

// Rows of a multiple of 8 channels: a thread keeps the coefficients of 8 and walks down its block's rows.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_rows_kernel(Apply<T> a, Channels s, unsigned tiles, int64_t block_rows) {
  using A = acc_t<T>;
  int64_t c = (int64_t(blockIdx.x % tiles) * blockDim.x + threadIdx.x) * kNormPack;
  if (c >= s.channels) return;
  A mean[kNormPack], scale[kNormPack], shift[kNormPack];
#pragma unroll
  for (int j = 0; j < kNormPack; ++j) {
    mean[j] = a.table[c + j];
    scale[j] = a.table[s.channels + c + j];
    shift[j] = a.table[2 * s.channels + c + j];
  }
  int64_t first = int64_t(blockIdx.x / tiles) * block_rows, end = first + block_rows;
  end = end < s.outer ? end : s.outer;
  for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
    apply_pack<T, 1>(a, row * s.channels + c, mean, scale, shift);
  }
}

// Any size: a warp takes 32 elements of a plane, or of all rows laid end to end.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_any_kernel(Apply<T> a, Channels s, bool rows, uint64_t groups) {
  uint64_t group = thread_item() / kWarp;
  int lane = int(threadIdx.x % kWarp);
  if (group >= groups) return;
  NormPlace at = place_of(s, rows, group, lane);
  acc_t<T> value = 0;
  bool passes = false;
  if (at.inside) {
    const acc_t<T>* k = a.table + at.channel;
    value = (to_acc(a.x[at.offset]) - k[0]) * k[s.channels] + k[2 * s.channels];
    if (a.residual != nullptr) value += to_acc(a.residual[at.offset]);
    passes = finish(value, a.relu);
    a.y[at.offset] = from_acc<T>(value);
  }
  if (a.mask == nullptr) return;
  unsigned bits = __ballot_sync(kFullMask, passes);
  if (at.inside && lane % 8 == 0) a.mask[at.byte] = uint8_t(bits >> lane);
}

// The coefficients from given statistics.
template <typename A>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_table_kernel(NormParameter mean, NormParameter var, NormParameter weight, NormParameter bias, A* table,
                            int64_t channels, double eps) {
  int64_t c = int64_t(thread_item());
  if (c >= channels) return;
  double exact = read_parameter(mean, c, 0.0);
  A scale = read_parameter(weight, c, A(1)) / A(sqrt(read_parameter(var, c, A(1)) + A(eps)));
  // float64 statistics beside a narrower x: what rounding took from the mean
  A rest = A(exact - double(A(exact)));
  table[c] = A(exact);
  table[channels + c] = scale;
  table[2 * channels + c] = read_parameter(bias, c, A(0)) - (rest - rest == A(0) ? rest * scale : A(0));
}

// running = (1 - momentum) * running + momentum * factor * batch.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_update_kernel(T* running, NormParameter batch, int64_t n, int64_t stride, double momentum,
                             double factor) {
  using A = acc_t<T>;
  int64_t i = int64_t(thread_item());
  if (i >= n) return;
  A old = to_acc(running[i * stride]), value = read_parameter(batch, i, A(0));
  running[i * stride] = from_acc<T>(A(1 - momentum) * old + A(momentum) * (A(factor) * value));
}

// ---- launchers

template <typename T>
void launch_apply(const char* op, const Apply<T>& a, const Channels& s, cudaStream_t stream) {
  if (!may_pack(s, {a.x, a.residual, a.y})) {
    const int64_t groups = norm_groups(s);
    const unsigned grid = norm_grid(op, ceil_div(groups, int64_t(kNormThreads / kWarp)));
    PYDL_LAUNCH(batch_norm_any_kernel<T>, grid, kNormThreads, 0, stream, a, s, s.rows(), uint64_t(groups));
  } else if (s.rows()) {
    const RowGrid rows = row_grid(op, s);
    PYDL_LAUNCH(batch_norm_rows_kernel<T>, rows.grid, rows.block, 0, stream, a, s, rows.tiles, rows.block_rows);
  } else {
    const int64_t items = s.numel() / kNormPack;
    const unsigned grid = norm_grid(op, ceil_div(items, int64_t(kNormThreads)));
    PYDL_LAUNCH(batch_norm_planes_kernel<T>, grid, kNormThreads, 0, stream, a, s, uint64_t(items));
  }
}

// ---- host functions

struct Applied {
  Output y, mask;
};

// y and its mask; `fill` writes the table of coefficients.
template <typename Fill>
Applied apply(const NormCall& f, const Dense& x, const std::optional<Tensor>& residual, bool relu, bool keep,
              const DeviceGuard& guard, const Fill& fill) {
  std::optional<Dense> other;
  if (residual.has_value()) {
    guard.check_same(f.op, "residual", *residual);
    other = f.layout.dense_in(f.op, "residual", *residual, f.dtype);
  }
  Applied out{norm_like(guard, f.layout, f.dtype), norm_vector(guard, keep ? f.shape.mask_bytes() : 0, Dtype::kUInt8)};
  if (f.shape.numel() == 0) return out;
  const Output table = norm_vector(guard, 3 * f.shape.channels, f.compute());
  fill(table.data);
  PYDL_CUDA_FLOAT_SWITCH(f.dtype, {
    const Apply<T> a{static_cast<const T*>(x.data),
                     other.has_value() ? static_cast<const T*>(other->data) : nullptr,
                     static_cast<T*>(out.y.data),
                     keep ? static_cast<uint8_t*>(out.mask.data) : nullptr,
                     relu,
                     static_cast<const acc_t<T>*>(table.data)};
    launch_apply(f.op, a, f.shape, guard.stream());
  });
  return out;
}

// Mean and variance of x into `final`.
void statistics(const NormCall& f, const Dense& x, const NormFinal& final, const DeviceGuard& guard) {
  const NormSplit split = split_of(f.shape, may_pack(f.shape, {x.data}));
  const Output partial =
      norm_vector(guard, split.splits > 1 ? int64_t(split.splits) * 3 * f.shape.channels : 0, f.compute());
  launch_norm_statistics(f.op, x.data, f.dtype, f.shape, split, partial.data, final, guard.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x_in, const std::optional<Tensor>& weight,
                                                            const std::optional<Tensor>& bias,
                                                            const std::optional<Tensor>& residual, bool relu,
                                                            double eps) {
  const Array meta(x_in);
  const NormCall f("batch_norm_train", meta);
  const DeviceGuard guard(x_in);
  const int64_t channels = f.channels();
  const NormOperand w(f.op, "weight", weight, channels, guard), b(f.op, "bias", bias, channels, guard);
  Output mean = norm_statistic(guard, f.shape, channels, f.compute());
  Output var = norm_statistic(guard, f.shape, channels, f.compute());
  const Dense x = f.layout.dense_in(f.op, "x", x_in, meta, f.dtype);
  Applied out = apply(f, x, residual, relu, relu, guard, [&](void* table) {
    statistics(f, x, {w.value, b.value, mean.data, var.data, table, eps}, guard);
  });
  return {std::move(out.y.tensor), std::move(mean.tensor), std::move(var.tensor), std::move(out.mask.tensor)};
}

std::tuple<Tensor, Tensor> batch_norm_eval(const Tensor& x_in, const Tensor& mean, const Tensor& var,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual, bool relu, double eps, bool keep) {
  const Array meta(x_in);
  const NormCall f("batch_norm_eval", meta);
  const DeviceGuard guard(x_in);
  const int64_t channels = f.channels();
  const NormOperand w(f.op, "weight", weight, channels, guard), b(f.op, "bias", bias, channels, guard);
  const NormOperand mu(f.op, "mean", mean, channels, guard), sigma(f.op, "var", var, channels, guard);
  const Dense x = f.layout.dense_in(f.op, "x", x_in, meta, f.dtype);
  Applied out = apply(f, x, residual, relu, relu && keep, guard, [&](void* table) {
    const unsigned grid = norm_grid(f.op, ceil_div(channels, int64_t(kNormThreads)));
    PYDL_CUDA_FLOAT_SWITCH(
        f.dtype, PYDL_LAUNCH(batch_norm_table_kernel<acc_t<T>>, grid, kNormThreads, 0, guard.stream(), mu.value,
                             sigma.value, w.value, b.value, static_cast<acc_t<T>*>(table), channels, eps));
  });
  return {std::move(out.y.tensor), std::move(out.mask.tensor)};
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x_in) {
  const Array meta(x_in);
  const NormCall f("batch_norm_stats", meta);
  const DeviceGuard guard(x_in);
  Output mean = norm_statistic(guard, f.shape, f.channels(), f.compute());
  Output var = norm_statistic(guard, f.shape, f.channels(), f.compute());
  const Dense x = f.layout.dense_in(f.op, "x", x_in, meta, f.dtype);
  if (f.shape.numel() > 0) statistics(f, x, {{}, {}, mean.data, var.data, nullptr, 0.0}, guard);
  return {std::move(mean.tensor), std::move(var.tensor)};
}

void update(const char* op, const char* name, const std::optional<Tensor>& running, const Tensor& batch,
            double momentum, double factor, const DeviceGuard& guard) {
  if (!running.has_value()) return;
  const Array to(*running);
  STD_TORCH_CHECK(to.dim == 1 && host::is_floating(to.dtype), op, ": ", name,
                  " must have one dimension and be floating point");
  const NormOperand from(op, "the batch's statistic", batch, to.sizes[0], guard);
  guard.check_same(op, name, *running);
  if (to.sizes[0] == 0) return;
  const unsigned grid = norm_grid(op, ceil_div(to.sizes[0], int64_t(kNormThreads)));
  PYDL_CUDA_FLOAT_SWITCH(
      to.dtype, PYDL_LAUNCH(batch_norm_update_kernel<T>, grid, kNormThreads, 0, guard.stream(),
                            static_cast<T*>(to.data), from.value, to.sizes[0], to.strides[0], momentum, factor));
}

void batch_norm_update(const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                       const Tensor& mean, const Tensor& var, double momentum, double correction) {
  const char* const op = "batch_norm_update";
  const DeviceGuard guard(mean);
  update(op, "running_mean", running_mean, mean, momentum, 1.0, guard);
  update(op, "running_var", running_var, var, momentum, correction, guard);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_train", TORCH_BOX(&batch_norm_train));
  m.impl("batch_norm_eval", TORCH_BOX(&batch_norm_eval));
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update));
}

}  // namespace pydl
