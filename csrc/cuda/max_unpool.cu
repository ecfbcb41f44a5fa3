// Max unpooling. Elements first claim their positions, the last of a plane winning, by a maximum of integers, which
// does not depend on the order of arrival; then every position is written once: its owner's value, or zero. The
// backward reads the gradient at the positions.
#include "common/atomics.h"
#include "cuda/pool.h"

namespace pydl {
namespace {

// ---- kernels

// owners: for each position of the larger side the number, in its plane, of the last element that names it, or -1.
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_unpool_claim_kernel(const int64_t* __restrict__ indices, int* __restrict__ owners, Pool p, uint64_t items) {
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t index = indices[item], pixels = inputs_of(p).pixels();
  if (index < 0 || index >= pixels) return;
  Place at = place_of(p, item, outputs_of(p));
  int own = int(pixel_of(outputs_of(p), at.d, at.h, at.w));
  atomicMax(owners + offset_of(p, at.n, at.c, pixels, index), own);
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_unpool_write_kernel(const T* __restrict__ x, const int* __restrict__ owners, T* __restrict__ y, Pool p,
                            uint64_t positions) {
  uint64_t item = thread_item();
  if (item >= positions) return;
  int owner = owners[item];
  Place at = place_of(p, item, inputs_of(p));
  y[item] = owner < 0 ? from_acc<T>(acc_t<T>(0)) : x[offset_of(p, at.n, at.c, outputs_of(p).pixels(), owner)];
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_unpool_bwd_kernel(const T* __restrict__ dy, const int64_t* __restrict__ indices, T* __restrict__ dx, Pool p,
                          uint64_t items) {
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t index = indices[item], pixels = inputs_of(p).pixels();
  Place at = place_of(p, item, outputs_of(p));
  bool inside = index >= 0 && index < pixels;
  dx[item] = inside ? dy[offset_of(p, at.n, at.c, pixels, index)] : from_acc<T>(acc_t<T>(0));
}

// ---- host functions

Tensor max_unpool_fwd(const Tensor& x_in, const Tensor& indices_in, const Sizes& size) {
  const char* const op = "max_unpool_fwd";
  const PoolShape s = unpool_shape(op, x_in, indices_in, size.data(), int64_t(size.size()));
  const Pool pool = make_pool(op, s);
  STD_TORCH_CHECK(outputs_of(pool).pixels() < int64_t(1) << 31, op, ": planes must have fewer than 2^31 elements");
  const DeviceGuard guard(x_in);
  guard.check_same(op, "indices", indices_in);
  const Tensor x = dense_in(x_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array meta(x), index(indices);
  Output y = empty_planes(guard, s, false, meta.dtype);
  const int64_t positions = Array(y.tensor).numel(), items = index.numel();
  if (positions == 0) return std::move(y.tensor);
  Output owners = empty_planes(guard, s, false, Dtype::kInt32);
  int* owner = static_cast<int*>(owners.data);
  guard.fill_bytes(owner, 0xff, size_t(positions) * sizeof(int));
  if (items > 0) {
    PYDL_LAUNCH(max_unpool_claim_kernel, pool_grid(op, items), kPoolThreads, 0, guard.stream(),
                static_cast<const int64_t*>(index.data), owner, pool, uint64_t(items));
  }
  PYDL_CUDA_FLOAT_SWITCH(meta.dtype, PYDL_LAUNCH(max_unpool_write_kernel<T>, pool_grid(op, positions), kPoolThreads, 0,
                                                 guard.stream(), static_cast<const T*>(meta.data), owner,
                                                 static_cast<T*>(y.data), pool, uint64_t(positions)));
  return std::move(y.tensor);
}

Tensor max_unpool_bwd(const Tensor& dy_in, const Tensor& indices_in) {
  const char* const op = "max_unpool_bwd";
  const Array meta(dy_in);
  STD_TORCH_CHECK(meta.dim >= 3 && meta.dim <= 5, op, ": dy must have 3 to 5 dimensions, got ", meta.dim);
  const PoolShape s = unpool_shape(op, dy_in, indices_in, meta.sizes + 2, meta.dim - 2);
  const Pool pool = make_pool(op, s);
  const DeviceGuard guard(dy_in);
  guard.check_same(op, "indices", indices_in);
  const Tensor dy = dense_in(dy_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array grad(dy), index(indices);
  Output dx = empty_planes(guard, s, true, grad.dtype);
  const int64_t items = index.numel();
  if (items == 0) return std::move(dx.tensor);
  PYDL_CUDA_FLOAT_SWITCH(grad.dtype,
                         PYDL_LAUNCH(max_unpool_bwd_kernel<T>, pool_grid(op, items), kPoolThreads, 0, guard.stream(),
                                     static_cast<const T*>(grad.data), static_cast<const int64_t*>(index.data),
                                     static_cast<T*>(dx.data), pool, uint64_t(items)));
  return std::move(dx.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("max_unpool_fwd", TORCH_BOX(&max_unpool_fwd));
  m.impl("max_unpool_bwd", TORCH_BOX(&max_unpool_bwd));
}

}  // namespace pydl
