// Batch normalisation, backward. With dz the gradient behind the activation's mask, n values per channel and
// xhat = (x - mean) * rstd:
//   dbias = sum dz,  dweight = sum dz * xhat,  dresidual = dz,
//   dx = (dz - dbias / n - xhat * dweight / n) * weight * rstd, with given statistics dz * weight * rstd.
// The sums read dy and x once, this file's kernels read them again and write dx.
#include "cuda/batch_norm.h"

namespace pydl {
namespace {

// ---- kernels

template <typename T>
struct Backward {
  const T *dy, *x;
  const uint8_t* mask;  // null if there was no activation
  T *dx, *dresidual;    // null if not wanted
  bool training;
  const acc_t<T>* table;  // mean, along, slope, scale
};

// In this order equal terms cancel exactly, as they must where a channel has one or two values.
template <typename A>
__device__ __forceinline__ A dx_of(A dz, A x, bool training, A mean, A along, A slope, A scale) {
  if (training) dz = (dz - along) - (x - mean) * slope;
  return dz * scale;
}

// 8 elements at `offset`, whose channels step by STEP in the coefficients.
template <typename T, int STEP>
__device__ __forceinline__ void dx_pack(const Backward<T>& a, int64_t offset, const acc_t<T>* mean,
                                        const acc_t<T>* along, const acc_t<T>* slope, const acc_t<T>* scale) {
  using A = acc_t<T>;
  A dz[kNormPack], x[kNormPack] = {};
  load_values<kNormPack>(a.dy + offset, dz);
  if (a.training) load_values<kNormPack>(a.x + offset, x);
  if (a.mask != nullptr) {
    unsigned bits = a.mask[offset / 8];
#pragma unroll
    for (int j = 0; j < kNormPack; ++j) dz[j] = bits >> j & 1u ? dz[j] : A(0);
  }
  if (a.dresidual != nullptr) store_values<kNormPack>(a.dresidual + offset, dz);
  if (a.dx == nullptr) return;
#pragma unroll
  for (int j = 0; j < kNormPack; ++j) {
    dz[j] = dx_of(dz[j], x[j], a.training, mean[j * STEP], along[j * STEP], slope[j * STEP], scale[j * STEP]);
  }
  store_values<kNormPack>(a.dx + offset, dz);
}

// Planes whose size is a multiple of 8, an item of 8 elements per thread.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_bwd_planes_kernel(Backward<T> a, Channels s, uint64_t items) {
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t offset = int64_t(item) * kNormPack;
  take_digit(item, int(s.inner / kNormPack));
  int c = take_digit(item, int(s.channels));
  const acc_t<T>* k = a.table + c;
  acc_t<T> mean = k[0], along = k[s.channels], slope = k[2 * s.channels], scale = k[3 * s.channels];
  dx_pack<T, 0>(a, offset, &mean, &along, &slope, &scale);
}

// Rows of a multiple of 8 channels: a thread keeps the coefficients of 8 and walks down its block's rows.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_bwd_rows_kernel(Backward<T> a, Channels s, unsigned tiles, int64_t block_rows) {
  using A = acc_t<T>;
  int64_t c = (int64_t(blockIdx.x % tiles) * blockDim.x + threadIdx.x) * kNormPack;
  if (c >= s.channels) return;
  A mean[kNormPack], along[kNormPack], slope[kNormPack], scale[kNormPack];
#pragma unroll
  for (int j = 0; j < kNormPack; ++j) {
    const A* k = a.table + c + j;
    mean[j] = k[0];
    along[j] = k[s.channels];
    slope[j] = k[2 * s.channels];
    scale[j] = k[3 * s.channels];
  }
  int64_t first = int64_t(blockIdx.x / tiles) * block_rows, end = first + block_rows;
  end = end < s.outer ? end : s.outer;
  for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
    dx_pack<T, 1>(a, row * s.channels + c, mean, along, slope, scale);
  }
}

// Any size: a warp takes 32 elements of a plane, or of all rows laid end to end.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_bwd_any_kernel(Backward<T> a, Channels s, bool rows, uint64_t groups) {
  uint64_t group = thread_item() / kWarp;
  int lane = int(threadIdx.x % kWarp);
  if (group >= groups) return;
  NormPlace at = place_of(s, rows, group, lane);
  if (!at.inside) return;
  acc_t<T> dz = to_acc(a.dy[at.offset]);
  if (a.mask != nullptr && (a.mask[at.byte] >> lane % 8 & 1) == 0) dz = 0;
  if (a.dresidual != nullptr) a.dresidual[at.offset] = from_acc<T>(dz);
  if (a.dx == nullptr) return;
  const acc_t<T>* k = a.table + at.channel;
  acc_t<T> x = a.training ? to_acc(a.x[at.offset]) : acc_t<T>(0);
  a.dx[at.offset] = from_acc<T>(dx_of(dz, x, a.training, k[0], k[s.channels], k[2 * s.channels], k[3 * s.channels]));
}

// ---- launchers

template <typename T>
void launch_dx(const char* op, const Backward<T>& a, const Channels& s, cudaStream_t stream) {
  if (!may_pack(s, {a.dy, a.x, a.dx, a.dresidual})) {
    const int64_t groups = norm_groups(s);
    const unsigned grid = norm_grid(op, ceil_div(groups, int64_t(kNormThreads / kWarp)));
    PYDL_LAUNCH(batch_norm_bwd_any_kernel<T>, grid, kNormThreads, 0, stream, a, s, s.rows(), uint64_t(groups));
  } else if (s.rows()) {
    const RowGrid rows = row_grid(op, s);
    PYDL_LAUNCH(batch_norm_bwd_rows_kernel<T>, rows.grid, rows.block, 0, stream, a, s, rows.tiles, rows.block_rows);
  } else {
    const int64_t items = s.numel() / kNormPack;
    const unsigned grid = norm_grid(op, ceil_div(items, int64_t(kNormThreads)));
    PYDL_LAUNCH(batch_norm_bwd_planes_kernel<T>, grid, kNormThreads, 0, stream, a, s, uint64_t(items));
  }
}

// ---- host functions

void run_backward(const NormCall& f, NormSums& sums, void* dx, void* dresidual, const DeviceGuard& guard) {
  const Channels& s = f.shape;
  const NormSplit split = split_of(s, may_pack(s, {sums.dy, sums.x}));
  const int64_t wanted = sums.sums && split.splits > 1 ? int64_t(split.splits) * 2 * s.channels : 0;
  const Output partial = norm_vector(guard, wanted, f.compute());
  const Output table = norm_vector(guard, 4 * s.channels, f.compute());
  sums.table = table.data;
  launch_norm_sums(f.op, sums, f.dtype, s, split, partial.data, guard.stream());
  if (dx == nullptr && dresidual == nullptr) return;
  PYDL_CUDA_FLOAT_SWITCH(f.dtype, {
    const Backward<T> a{static_cast<const T*>(sums.dy),
                        static_cast<const T*>(sums.x),
                        sums.mask,
                        static_cast<T*>(dx),
                        static_cast<T*>(dresidual),
                        sums.training,
                        static_cast<const acc_t<T>*>(table.data)};
    launch_dx(f.op, a, s, guard.stream());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& dy_in, const Tensor& x_in, const Tensor& mean,
                                                          const Tensor& var, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& mask_in, bool training,
                                                          double eps, const std::vector<bool>& output_mask) {
  const Array meta(x_in);
  const NormCall f("batch_norm_bwd", meta);
  const DeviceGuard guard(x_in);
  STD_TORCH_CHECK(output_mask.size() == 4, f.op, ": output_mask must have 4 entries, got ", output_mask.size());
  STD_TORCH_CHECK(mask_in.has_value() || !output_mask[3], f.op, ": without a mask the gradient of residual is dy");
  const int64_t channels = f.channels();
  const NormOperand w(f.op, "weight", weight, channels, guard), mu(f.op, "mean", mean, channels, guard);
  const NormOperand sigma(f.op, "var", var, channels, guard);
  guard.check_same(f.op, "dy", dy_in);
  const Dense x = f.layout.dense_in(f.op, "x", x_in, meta, f.dtype);
  const Dense dy = f.layout.dense_in(f.op, "dy", dy_in, f.dtype);
  NormSums sums{};
  std::optional<Tensor> mask;
  if (mask_in.has_value()) {
    guard.check_same(f.op, "mask", *mask_in);
    mask = host::as_contiguous(*mask_in);
    const Array bits(*mask);
    STD_TORCH_CHECK(bits.dtype == Dtype::kUInt8 && bits.numel() == f.shape.mask_bytes(), f.op,
                    ": mask must be uint8 with ", f.shape.mask_bytes(), " elements, got ", bits.numel());
    sums.mask = static_cast<const uint8_t*>(bits.data);
  }
  Output dx = output_mask[0] ? norm_like(guard, f.layout, f.dtype) : norm_vector(guard, 0, f.dtype);
  Output dweight = norm_statistic(guard, f.shape, output_mask[1] ? channels : 0, f.compute());
  Output dbias = norm_statistic(guard, f.shape, output_mask[2] ? channels : 0, f.compute());
  Output dresidual = output_mask[3] ? norm_like(guard, f.layout, f.dtype) : norm_vector(guard, 0, f.dtype);
  if (f.shape.numel() > 0) {
    sums.dy = dy.data;
    sums.x = x.data;
    sums.weight = w.value;
    sums.mean = mu.value;
    sums.var = sigma.value;
    sums.dweight = output_mask[1] ? dweight.data : nullptr;
    sums.dbias = output_mask[2] ? dbias.data : nullptr;
    sums.sums = output_mask[1] || output_mask[2] || (training && output_mask[0]);
    sums.training = training;
    sums.eps = eps;
    run_backward(f, sums, output_mask[0] ? dx.data : nullptr, output_mask[3] ? dresidual.data : nullptr, guard);
  }
  return {std::move(dx.tensor), std::move(dweight.tensor), std::move(dbias.tensor), std::move(dresidual.tensor)};
}

// dx from sums that were taken elsewhere, divided by the number of values they stand for.
Tensor batch_norm_dx(const Tensor& dy_in, const Tensor& x_in, const Tensor& mean, const Tensor& var,
                     const std::optional<Tensor>& weight, const Tensor& dweight, const Tensor& dbias, double eps) {
  const Array meta(x_in);
  const NormCall f("batch_norm_dx", meta);
  const DeviceGuard guard(x_in);
  const int64_t channels = f.channels();
  const NormOperand w(f.op, "weight", weight, channels, guard), mu(f.op, "mean", mean, channels, guard);
  const NormOperand sigma(f.op, "var", var, channels, guard);
  const NormOperand dw(f.op, "dweight", dweight, channels, guard), db(f.op, "dbias", dbias, channels, guard);
  guard.check_same(f.op, "dy", dy_in);
  const Dense x = f.layout.dense_in(f.op, "x", x_in, meta, f.dtype);
  const Dense dy = f.layout.dense_in(f.op, "dy", dy_in, f.dtype);
  Output dx = norm_like(guard, f.layout, f.dtype);
  if (f.shape.numel() > 0) {
    NormSums sums{};
    sums.dy = dy.data;
    sums.x = x.data;
    sums.weight = w.value;
    sums.mean = mu.value;
    sums.var = sigma.value;
    sums.mean_dy_xhat = dw.value;
    sums.mean_dy = db.value;
    sums.training = true;
    sums.eps = eps;
    run_backward(f, sums, dx.data, nullptr, guard);
  }
  return std::move(dx.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_norm_bwd));
  m.impl("batch_norm_dx", TORCH_BOX(&batch_norm_dx));
}

}  // namespace pydl
