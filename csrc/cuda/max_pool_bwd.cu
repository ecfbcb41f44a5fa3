// Max pooling backward as a gather: each input element adds the gradients of the windows whose maximum it is, in the
// order of the outputs. No atomics and no zeroing; the bytes are dy and the offsets once, dx once.
#include "cuda/pool.h"

namespace pydl {
namespace {

constexpr int kNoTap = 255;  // offsets number at most 255 taps, 0 ... 254

// ---- kernels

// Any geometry, either layout, one input element per thread. Exactly one of offsets and flat is set.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_bwd_any_kernel(const T* __restrict__ dy, const uint8_t* __restrict__ offsets,
                            const int64_t* __restrict__ flat, T* __restrict__ dx, Pool p, uint64_t inputs) {
  uint64_t item = thread_item();
  if (item >= inputs) return;
  Place at = place_of(p, item, p.h.in, p.w.in);
  Cover rows = cover_of(p.h, at.row), cols = cover_of(p.w, at.col);
  int64_t own = int64_t(at.row) * p.w.in + at.col;
  acc_t<T> sum = 0;
  for (int oh = rows.first; oh <= rows.last; ++oh) {
    int kh = tap_between(p.h, oh, at.row);
    if (kh < 0) continue;
    for (int ow = cols.first; ow <= cols.last; ++ow) {
      int kw = tap_between(p.w, ow, at.col);
      if (kw < 0) continue;
      int64_t out = offset_of(p, at.n, at.c, oh, ow, p.h.out, p.w.out);
      bool chosen = flat != nullptr ? flat[out] == own : int(offsets[out]) == kh * p.w.kernel + kw;
      if (chosen) sum += to_acc(dy[out]);
    }
  }
  dx[item] = from_acc<T>(sum);
}

// Windows that touch inputs [q * S, q * S + size): q + LO ... q + high(size).
template <typename Win>
struct Reach {
  static constexpr int LO = -((Win::K - 1 - Win::P) / Win::S);
  static constexpr int high(int size) { return (size - 1 + Win::P) / Win::S; }
};

// Adds one window's gradient to the tile element it points at; all indices are constants after unrolling.
template <typename Win, int WIDTH>
__device__ __forceinline__ void scatter_in_registers(float (&sums)[Win::S][WIDTH], int r, int c, int tap, float grad) {
#pragma unroll
  for (int a = 0; a < Win::S; ++a) {
#pragma unroll
    for (int b = 0; b < WIDTH; ++b) {
      int kh = a + Win::P - r * Win::S, kw = b + Win::P - c * Win::S;
      if (kh >= 0 && kh < Win::K && kw >= 0 && kw < Win::K && tap == kh * Win::K + kw) sums[a][b] += grad;
    }
  }
}

// Contiguous planes, unrolled windows: a thread owns a tile of S rows and COLS * S columns of dx. COLS > 1: the rows of
// dx are stored 16 bytes at a time.
template <typename T, typename Win, int COLS>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_bwd_window_kernel(const T* __restrict__ dy, const uint8_t* __restrict__ offsets, T* __restrict__ dx,
                               Pool p, uint64_t items) {
  constexpr int kWidth = COLS * Win::S;
  uint64_t item = thread_item();
  if (item >= items) return;
  int col_tile = take_digit(item, ceil_div(p.w.in, kWidth)), row_tile = take_digit(item, ceil_div(p.h.in, Win::S));
  int64_t plane = int64_t(item) * p.h.out * p.w.out;
  float sums[Win::S][kWidth] = {};
#pragma unroll
  for (int r = Reach<Win>::LO; r <= Reach<Win>::high(Win::S); ++r) {
    int oh = row_tile + r;
    bool row_inside = oh >= 0 && oh < p.h.out;
    int64_t row = plane + int64_t(oh) * p.w.out;
#pragma unroll
    for (int c = Reach<Win>::LO; c <= Reach<Win>::high(kWidth); ++c) {
      int ow = col_tile * COLS + c;
      bool inside = row_inside && ow >= 0 && ow < p.w.out;
      int tap = inside ? int(offsets[row + ow]) : kNoTap;
      float grad = inside ? to_acc(dy[row + ow]) : 0.0f;
      scatter_in_registers<Win, kWidth>(sums, r, c, tap, grad);
    }
  }
  int ih = row_tile * Win::S, iw = col_tile * kWidth;
  int64_t in = (int64_t(item) * p.h.in + ih) * p.w.in + iw;
#pragma unroll
  for (int a = 0; a < Win::S; ++a, in += p.w.in) {
    if (ih + a >= p.h.in) return;
    Pack<T, kWidth> values;
#pragma unroll
    for (int b = 0; b < kWidth; ++b) values.at[b] = from_acc<T>(sums[a][b]);
    if constexpr (COLS > 1) {
      store_pack(dx + in, values);
    } else {
#pragma unroll
      for (int b = 0; b < kWidth; ++b) {
        if (iw + b < p.w.in) dx[in + b] = values.at[b];
      }
    }
  }
}

// channels_last, any geometry: a thread holds 16 bytes of channels of one input position.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_bwd_channels_kernel(const T* __restrict__ dy, const uint8_t* __restrict__ offsets, T* __restrict__ dx,
                                 Pool p, uint64_t items) {
  constexpr int N = kVectorBytes / int(sizeof(T));
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t in = int64_t(item) * N;
  int c = take_digit(item, p.channels / N) * N;
  int iw = take_digit(item, p.w.in), ih = take_digit(item, p.h.in);
  Cover rows = cover_of(p.h, ih), cols = cover_of(p.w, iw);
  float sums[N] = {};
  for (int oh = rows.first; oh <= rows.last; ++oh) {
    int kh = tap_between(p.h, oh, ih);
    if (kh < 0) continue;
    int64_t row = (int64_t(item) * p.h.out + oh) * p.w.out;
    for (int ow = cols.first; ow <= cols.last; ++ow) {
      int kw = tap_between(p.w, ow, iw);
      if (kw < 0) continue;
      int64_t out = (row + ow) * p.channels + c;
      Pack<uint8_t, N> taps = load_pack<N>(offsets + out);
      Pack<T, N> grads = load_pack<N>(dy + out);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (int(taps.at[i]) == kh * p.w.kernel + kw) sums[i] += to_acc(grads.at[i]);
      }
    }
  }
  Pack<T, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.at[i] = from_acc<T>(sums[i]);
  store_pack(dx + in, values);
}

// y = x at the chosen positions, 0 where an index points outside the input or, as an offset, outside the window.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_gather_kernel(const T* __restrict__ x, const uint8_t* __restrict__ offsets,
                           const int64_t* __restrict__ flat, T* __restrict__ y, Pool p, uint64_t outputs) {
  uint64_t item = thread_item();
  if (item >= outputs) return;
  Place at = place_of(p, item, p.h.out, p.w.out);
  int64_t row, col;
  if (flat != nullptr) {
    row = flat[item] / p.w.in;
    col = flat[item] - row * p.w.in;
  } else {
    int tap = offsets[item];
    if (tap >= p.h.kernel * p.w.kernel) tap = -1;
    row = at.row * p.h.stride - p.h.padding + int64_t(tap / p.w.kernel) * p.h.dilation;
    col = tap < 0 ? -1 : at.col * p.w.stride - p.w.padding + int64_t(tap % p.w.kernel) * p.w.dilation;
  }
  bool inside = row >= 0 && row < p.h.in && col >= 0 && col < p.w.in;
  y[item] = inside ? x[offset_of(p, at.n, at.c, int(row), int(col), p.h.in, p.w.in)] : from_acc<T>(acc_t<T>(0));
}

// ---- launchers

struct Backward {
  const void* from;  // dy, or x of the gather
  const void* indices;
  void* to;
  bool flat;
  Pool pool;
  cudaStream_t stream;
  const char* op;

  const uint8_t* offsets() const { return flat ? nullptr : static_cast<const uint8_t*>(indices); }
  const int64_t* positions() const { return flat ? static_cast<const int64_t*>(indices) : nullptr; }
};

template <typename T, typename Win, int COLS>
void launch_window(const Backward& b) {
  const Pool& p = b.pool;
  int64_t items = p.batch * p.channels * ceil_div(p.h.in, Win::S) * ceil_div(p.w.in, COLS * Win::S);
  PYDL_LAUNCH((max_pool_bwd_window_kernel<T, Win, COLS>), pool_grid(b.op, items), kPoolThreads, 0, b.stream,
              static_cast<const T*>(b.from), b.offsets(), static_cast<T*>(b.to), p, uint64_t(items));
}

template <typename T>
bool launch_vectorised(const Backward& b) {
  constexpr int N = kVectorBytes / int(sizeof(T));
  const Pool& p = b.pool;
  if (b.flat) return false;
  if (!p.channels_last) {
    return with_window(p, [&](auto window) {
      using Win = decltype(window);
      p.w.in % N == 0 ? launch_window<T, Win, N / Win::S>(b) : launch_window<T, Win, 1>(b);
    });
  }
  if (p.channels % N != 0 || !is_aligned(b.from, kVectorBytes) || !is_aligned(b.indices, N)) return false;
  int64_t items = p.batch * p.h.in * p.w.in * (p.channels / N);
  PYDL_LAUNCH(max_pool_bwd_channels_kernel<T>, pool_grid(b.op, items), kPoolThreads, 0, b.stream,
              static_cast<const T*>(b.from), b.offsets(), static_cast<T*>(b.to), p, uint64_t(items));
  return true;
}

template <typename T>
void launch_backward(const Backward& b) {
  if constexpr (sizeof(T) <= 4) {
    if (launch_vectorised<T>(b)) return;
  }
  int64_t inputs = b.pool.batch * b.pool.channels * b.pool.h.in * b.pool.w.in;
  PYDL_LAUNCH(max_pool_bwd_any_kernel<T>, pool_grid(b.op, inputs), kPoolThreads, 0, b.stream,
              static_cast<const T*>(b.from), b.offsets(), b.positions(), static_cast<T*>(b.to), b.pool,
              uint64_t(inputs));
}

template <typename T>
void launch_gather(const Backward& b) {
  int64_t outputs = b.pool.batch * b.pool.channels * b.pool.h.out * b.pool.w.out;
  PYDL_LAUNCH(max_pool_gather_kernel<T>, pool_grid(b.op, outputs), kPoolThreads, 0, b.stream,
              static_cast<const T*>(b.from), b.offsets(), b.positions(), static_cast<T*>(b.to), b.pool,
              uint64_t(outputs));
}

// ---- host functions

Tensor max_pool2d_bwd(const Tensor& dy_in, const Tensor& indices_in, int64_t height, int64_t width,
                      const Sizes& window) {
  const char* const op = "max_pool2d_bwd";
  const PoolShape s = index_shape(op, Array(indices_in), height, width, window);
  const Pool pool = make_pool(op, s);
  const DeviceGuard guard(dy_in);
  guard.check_same(op, "indices", indices_in);
  const Tensor dy = dense_in(dy_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array grad(dy), index(indices);
  STD_TORCH_CHECK(host::is_floating(grad.dtype), op, ": dy must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(grad.dim == 4 && std::equal(grad.sizes, grad.sizes + 4, index.sizes), op,
                  ": dy must have the shape of indices");
  Output dx = empty_planes(guard, s, false, grad.dtype);
  if (s.batch == 0 || s.channels == 0) return std::move(dx.tensor);
  bool flat = index.dtype == Dtype::kInt64;
  Backward b{grad.data, index.data, dx.data, flat, pool, guard.stream(), op};
  PYDL_CUDA_FLOAT_SWITCH(grad.dtype, launch_backward<T>(b));
  return std::move(dx.tensor);
}

Tensor max_pool2d_gather(const Tensor& x_in, const Tensor& indices_in, const Sizes& window) {
  const char* const op = "max_pool2d_gather";
  const Array meta(x_in);
  STD_TORCH_CHECK(meta.dim == 4, op, ": x must have 4 dimensions, got ", meta.dim);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const PoolShape s = index_shape(op, Array(indices_in), meta.sizes[2], meta.sizes[3], window);
  STD_TORCH_CHECK(meta.sizes[0] == s.batch && meta.sizes[1] == s.channels, op, ": indices must have ", meta.sizes[0],
                  " x ", meta.sizes[1], " planes as x, got ", s.batch, " x ", s.channels);
  const Pool pool = make_pool(op, s);
  const DeviceGuard guard(x_in);
  guard.check_same(op, "indices", indices_in);
  const Tensor x = dense_in(x_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array input(x), index(indices);
  Output y = empty_planes(guard, s, true, input.dtype);
  if (s.batch * s.channels * s.h.out * s.w.out == 0) return std::move(y.tensor);
  bool flat = index.dtype == Dtype::kInt64;
  Backward b{input.data, index.data, y.data, flat, pool, guard.stream(), op};
  PYDL_CUDA_FLOAT_SWITCH(input.dtype, launch_gather<T>(b));
  return std::move(y.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("max_pool2d_bwd", TORCH_BOX(&max_pool2d_bwd));
  m.impl("max_pool2d_gather", TORCH_BOX(&max_pool2d_gather));
}

}  // namespace pydl
