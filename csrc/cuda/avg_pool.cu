// Mean pooling over one to three dimensions, forward and backward. Both are gathers: a thread writes an output from the
// inputs of its window, or an input's gradient from the windows that hold it. No atomics; what overlaps is read from
// the cache, so that the bytes are x once and y once. The taps of a row are added up before the rows are.
#include "common/warp.h"
#include "cuda/pool.h"

namespace pydl {
namespace {

// ---- kernels

// What every element is divided by: `fixed`, or what its window counts. The product of the three dimensions' shares.
struct Divisor {
  int64_t fixed;  // 0: none
  bool include_padding;

  template <typename C>
  __device__ C share(const Axis& a, int o) const {
    return C(counted(a, o, include_padding));
  }
  // Of all windows at (od, oh); the columns' share is left.
  template <typename C>
  __device__ C of_row(const Pool& p, int od, int oh) const {
    return fixed != 0 ? C(fixed) : share<C>(p.d, od) * share<C>(p.h, oh);
  }
  template <typename C>
  __device__ C of_column(const Pool& p, int ow) const {
    return fixed != 0 ? C(1) : share<C>(p.w, ow);
  }
};

// Positions of one dimension that the written position `at` depends on.
template <bool FORWARD>
__device__ __forceinline__ Span<int> sources(const Axis& a, int at) {
  return FORWARD ? inputs_of(a, at) : outputs_of(a, at);
}
template <bool FORWARD>
__host__ __device__ constexpr int read(const Axis& a) {
  return FORWARD ? a.in : a.out;
}
template <bool FORWARD>
__host__ __device__ constexpr int written(const Axis& a) {
  return FORWARD ? a.out : a.in;
}

// N neighbouring elements of one written position: channels, or one element. `from` is the image's first of them, and
// `step` the distance between columns.
template <bool FORWARD, int N, typename T>
__device__ __forceinline__ Pack<T, N> mean_at(const T* __restrict__ from, const Pool& p, const Divisor& divisor, int i,
                                              int j, int k, int step) {
  using C = acc_t<T>;
  Span<int> depths = sources<FORWARD>(p.d, i), rows = sources<FORWARD>(p.h, j), cols = sources<FORWARD>(p.w, k);
  C sums[N] = {};
  for (int d = depths.first; d < depths.last; ++d) {
    for (int h = rows.first; h < rows.last; ++h) {
      const T* row = from + (int64_t(d) * read<FORWARD>(p.h) + h) * read<FORWARD>(p.w) * step;
      C row_sums[N] = {};
      for (int w = cols.first; w < cols.last; ++w) {
        Pack<T, N> pack;
        if constexpr (N > 1) {
          pack = load_pack<N>(row + int64_t(w) * step);
        } else {
          pack.at[0] = row[int64_t(w) * step];
        }
        C share = FORWARD ? C(1) : divisor.of_column<C>(p, w);
#pragma unroll
        for (int n = 0; n < N; ++n) row_sums[n] += FORWARD ? to_acc(pack.at[n]) : to_acc(pack.at[n]) / share;
      }
      C share = FORWARD ? C(1) : divisor.of_row<C>(p, d, h);
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] += FORWARD ? row_sums[n] : row_sums[n] / share;
    }
  }
  C whole = FORWARD ? divisor.of_row<C>(p, i, j) * divisor.of_column<C>(p, k) : C(1);
  Pack<T, N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) result.at[n] = from_acc<T>(FORWARD ? sums[n] / whole : sums[n]);
  return result;
}

// Any geometry, either layout, one element per thread.
template <bool FORWARD, typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    avg_pool_any_kernel(const T* __restrict__ from, T* __restrict__ to, Pool p, Divisor divisor, uint64_t items) {
  uint64_t item = thread_item();
  if (item >= items) return;
  to += item;
  int c = p.channels_last ? take_digit(item, p.channels) : 0;
  int k = take_digit(item, written<FORWARD>(p.w)), j = take_digit(item, written<FORWARD>(p.h));
  int i = take_digit(item, written<FORWARD>(p.d));
  int step = p.channels_last ? p.channels : 1;
  int64_t pixels = int64_t(read<FORWARD>(p.d)) * read<FORWARD>(p.h) * read<FORWARD>(p.w);
  from += int64_t(item) * pixels * step + c;
  *to = mean_at<FORWARD, 1>(from, p, divisor, i, j, k, step).at[0];
}

// channels_last, any geometry: a thread holds 16 bytes of channels.
template <bool FORWARD, typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    avg_pool_channels_kernel(const T* __restrict__ from, T* __restrict__ to, Pool p, Divisor divisor, uint64_t items) {
  constexpr int N = kVectorBytes / int(sizeof(T));
  uint64_t item = thread_item();
  if (item >= items) return;
  to += int64_t(item) * N;
  int c = take_digit(item, p.channels / N) * N;
  int k = take_digit(item, written<FORWARD>(p.w)), j = take_digit(item, written<FORWARD>(p.h));
  int i = take_digit(item, written<FORWARD>(p.d));
  int64_t pixels = int64_t(read<FORWARD>(p.d)) * read<FORWARD>(p.h) * read<FORWARD>(p.w);
  from += int64_t(item) * pixels * p.channels + c;
  store_pack(to, mean_at<FORWARD, N>(from, p, divisor, i, j, k, p.channels));
}

// Contiguous planes, windows of many elements: a warp adds up one, its lanes side by side along the rows.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    avg_pool_warp_kernel(const T* __restrict__ x, T* __restrict__ y, Pool p, Divisor divisor, uint64_t outputs) {
  using C = acc_t<T>;
  uint64_t item = thread_item() / kWarp;
  if (item >= outputs) return;
  y += item;
  int k = take_digit(item, p.w.out), j = take_digit(item, p.h.out), i = take_digit(item, p.d.out);
  Span<int> depths = inputs_of(p.d, i), rows = inputs_of(p.h, j), cols = inputs_of(p.w, k);
  x += int64_t(item) * p.d.in * p.h.in * p.w.in;
  int width = cols.last - cols.first, lane = int(threadIdx.x) % kWarp;
  uint64_t area = uint64_t(rows.last - rows.first) * width;
  C sum = 0;
  for (int d = depths.first; d < depths.last; ++d) {
    C part = 0;
    for (uint64_t at = lane; at < area; at += kWarp) {
      uint64_t row = at;
      int w = take_digit(row, width);
      part += to_acc(x[(int64_t(d) * p.h.in + rows.first + int64_t(row)) * p.w.in + cols.first + w]);
    }
    sum += part;
  }
  sum = warp_sum(sum);
  if (lane == 0) *y = from_acc<T>(sum / (divisor.of_row<C>(p, i, j) * divisor.of_column<C>(p, k)));
}

// ---- launchers

struct Mean {
  const void* from;
  void* to;
  Pool pool;
  Divisor divisor;
  cudaStream_t stream;
  const char* op;
};

template <bool FORWARD, typename T>
void launch_mean(const Mean& m) {
  const Pool& p = m.pool;
  const T* from = static_cast<const T*>(m.from);
  T* to = static_cast<T*>(m.to);
  int64_t pixels = int64_t(written<FORWARD>(p.d)) * written<FORWARD>(p.h) * written<FORWARD>(p.w);
  int64_t elements = p.batch * p.channels * pixels;
  constexpr int N = kVectorBytes / int(sizeof(T));
  if (p.channels_last && p.channels % N == 0 && is_aligned(from, kVectorBytes)) {
    PYDL_LAUNCH((avg_pool_channels_kernel<FORWARD, T>), pool_grid(m.op, elements / N), kPoolThreads, 0, m.stream, from,
                to, p, m.divisor, uint64_t(elements / N));
    return;
  }
  if constexpr (FORWARD) {
    constexpr int64_t kManyTaps = 48;  // fewer leave lanes without one
    int64_t taps = pixels == 0 ? 0 : std::min<int64_t>(p.w.in, p.w.adaptive ? p.w.in / p.w.out : p.w.kernel);
    taps *= pixels == 0 ? 0 : std::min<int64_t>(p.h.in, p.h.adaptive ? p.h.in / p.h.out : p.h.kernel);
    if (!p.channels_last && taps >= kManyTaps) {
      PYDL_LAUNCH(avg_pool_warp_kernel<T>, pool_grid(m.op, elements * kWarp), kPoolThreads, 0, m.stream, from, to, p,
                  m.divisor, uint64_t(elements));
      return;
    }
  }
  PYDL_LAUNCH((avg_pool_any_kernel<FORWARD, T>), pool_grid(m.op, elements), kPoolThreads, 0, m.stream, from, to, p,
              m.divisor, uint64_t(elements));
}

// ---- host functions

Tensor mean(const char* op, const Tensor& given, const PoolShape& s, bool forward, bool include_padding,
            std::optional<int64_t> divisor) {
  STD_TORCH_CHECK(divisor.value_or(1) != 0, op, ": divisor must not be zero");
  const Pool pool = make_pool(op, s);
  const DeviceGuard guard(given);
  const Tensor from = dense_in(given, s.channels_last);
  const Array meta(from);
  Output to = empty_planes(guard, s, forward, meta.dtype);
  if (Array(to.tensor).numel() == 0) return std::move(to.tensor);
  const Mean m{meta.data, to.data, pool, {divisor.value_or(0), include_padding}, guard.stream(), op};
  PYDL_CUDA_FLOAT_SWITCH(meta.dtype, forward ? launch_mean<true, T>(m) : launch_mean<false, T>(m));
  return std::move(to.tensor);
}

Tensor avg_pool_fwd(const Tensor& x, const Sizes& window, bool include_padding, std::optional<int64_t> divisor) {
  const char* const op = "avg_pool_fwd";
  return mean(op, x, mean_shape(op, x, window, true), true, include_padding, divisor);
}

Tensor avg_pool_bwd(const Tensor& dy, const Sizes& window, bool include_padding, std::optional<int64_t> divisor,
                    bool channels_last) {
  const char* const op = "avg_pool_bwd";
  PoolShape s = mean_shape(op, dy, window, false);
  s.channels_last = channels_last;
  return mean(op, dy, s, false, include_padding, divisor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("avg_pool_fwd", TORCH_BOX(&avg_pool_fwd));
  m.impl("avg_pool_bwd", TORCH_BOX(&avg_pool_bwd));
}

}  // namespace pydl
