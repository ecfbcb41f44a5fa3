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
  const Extents in = inputs_of(p), out = outputs_of(p);
  Place at = place_of(p, item, in);
  Span<int> depths = covering(p.d, at.d), rows = covering(p.h, at.h), cols = covering(p.w, at.w);
  int64_t own = pixel_of(in, at.d, at.h, at.w);
  acc_t<T> sum = 0;
  for (int od = depths.first; od < depths.last; ++od) {
    int i = tap_at(p.d, od, at.d);
    for (int oh = rows.first; i >= 0 && oh < rows.last; ++oh) {
      int j = tap_at(p.h, oh, at.h);
      for (int ow = cols.first; j >= 0 && ow < cols.last; ++ow) {
        int k = tap_at(p.w, ow, at.w);
        if (k < 0) continue;
        int64_t from = offset_of(p, at.n, at.c, out.pixels(), pixel_of(out, od, oh, ow));
        bool chosen = flat != nullptr ? flat[from] == own : int(offsets[from]) == tap_number(p, i, j, k);
        if (chosen) sum += to_acc(dy[from]);
      }
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
  int iw = take_digit(item, p.w.in), ih = take_digit(item, p.h.in), id = take_digit(item, p.d.in);
  Span<int> depths = covering(p.d, id), rows = covering(p.h, ih), cols = covering(p.w, iw);
  const Extents outs = outputs_of(p);
  float sums[N] = {};
  for (int od = depths.first; od < depths.last; ++od) {
    int i = tap_at(p.d, od, id);
    for (int oh = rows.first; i >= 0 && oh < rows.last; ++oh) {
      int j = tap_at(p.h, oh, ih);
      int64_t row = int64_t(item) * outs.pixels() + pixel_of(outs, od, oh, 0);
      for (int ow = cols.first; j >= 0 && ow < cols.last; ++ow) {
        int k = tap_at(p.w, ow, iw);
        if (k < 0) continue;
        int64_t from = (row + ow) * p.channels + c;
        Pack<uint8_t, N> taps = load_pack<N>(offsets + from);
        Pack<T, N> grads = load_pack<N>(dy + from);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          if (int(taps.at[n]) == tap_number(p, i, j, k)) sums[n] += to_acc(grads.at[n]);
        }
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
  const Extents in = inputs_of(p);
  Place at = place_of(p, item, outputs_of(p));
  int64_t pixel = -1;
  if (flat != nullptr) {
    if (flat[item] >= 0 && flat[item] < in.pixels()) pixel = flat[item];
  } else {
    int tap = offsets[item];
    int i = tap / p.w.kernel / p.h.kernel, j = tap / p.w.kernel % p.h.kernel, k = tap % p.w.kernel;
    int64_t d = window_start(p.d, at.d) + int64_t(i) * p.d.dilation, h = window_start(p.h, at.h);
    int64_t w = window_start(p.w, at.w) + int64_t(k) * p.w.dilation;
    h += int64_t(j) * p.h.dilation;
    bool inside = d >= 0 && d < in.d && h >= 0 && h < in.h && w >= 0 && w < in.w;
    if (inside && i < p.d.kernel) pixel = pixel_of(in, int(d), int(h), int(w));
  }
  y[item] = pixel < 0 ? from_acc<T>(acc_t<T>(0)) : x[offset_of(p, at.n, at.c, in.pixels(), pixel)];
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
  int64_t items = p.batch * inputs_of(p).pixels() * (p.channels / N);
  PYDL_LAUNCH(max_pool_bwd_channels_kernel<T>, pool_grid(b.op, items), kPoolThreads, 0, b.stream,
              static_cast<const T*>(b.from), b.offsets(), static_cast<T*>(b.to), p, uint64_t(items));
  return true;
}

template <typename T>
void launch_backward(const Backward& b) {
  if constexpr (sizeof(T) <= 4) {
    if (launch_vectorised<T>(b)) return;
  }
  int64_t inputs = b.pool.batch * b.pool.channels * inputs_of(b.pool).pixels();
  PYDL_LAUNCH(max_pool_bwd_any_kernel<T>, pool_grid(b.op, inputs), kPoolThreads, 0, b.stream,
              static_cast<const T*>(b.from), b.offsets(), b.positions(), static_cast<T*>(b.to), b.pool,
              uint64_t(inputs));
}

template <typename T>
void launch_gather(const Backward& b) {
  int64_t outputs = b.pool.batch * b.pool.channels * outputs_of(b.pool).pixels();
  PYDL_LAUNCH(max_pool_gather_kernel<T>, pool_grid(b.op, outputs), kPoolThreads, 0, b.stream,
              static_cast<const T*>(b.from), b.offsets(), b.positions(), static_cast<T*>(b.to), b.pool,
              uint64_t(outputs));
}

// ---- host functions

Tensor max_pool_bwd(const Tensor& dy_in, const Tensor& indices_in, const Sizes& size, const Sizes& window) {
  const char* const op = "max_pool_bwd";
  const PoolShape s = index_shape(op, indices_in, size.data(), int64_t(size.size()), window);
  const Pool pool = make_pool(op, s);
  const DeviceGuard guard(dy_in);
  guard.check_same(op, "indices", indices_in);
  const Tensor dy = dense_in(dy_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array grad(dy), index(indices);
  STD_TORCH_CHECK(host::is_floating(grad.dtype), op, ": dy must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(grad.dim == index.dim && std::equal(grad.sizes, grad.sizes + grad.dim, index.sizes), op,
                  ": dy must have the shape of indices");
  Output dx = empty_planes(guard, s, false, grad.dtype);
  if (s.batch == 0 || s.channels == 0) return std::move(dx.tensor);
  bool flat = index.dtype == Dtype::kInt64;
  Backward b{grad.data, index.data, dx.data, flat, pool, guard.stream(), op};
  PYDL_CUDA_FLOAT_SWITCH(grad.dtype, launch_backward<T>(b));
  return std::move(dx.tensor);
}

Tensor max_pool_gather(const Tensor& x_in, const Tensor& indices_in, const Sizes& window) {
  const char* const op = "max_pool_gather";
  const Array meta(x_in);
  STD_TORCH_CHECK(meta.dim >= 3 && meta.dim <= 5, op, ": x must have 3 to 5 dimensions, got ", meta.dim);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const PoolShape s = index_shape(op, indices_in, meta.sizes + 2, meta.dim - 2, window);
  STD_TORCH_CHECK(meta.sizes[0] == s.batch && meta.sizes[1] == s.channels, op, ": indices must have ", meta.sizes[0],
                  " x ", meta.sizes[1], " planes as x, got ", s.batch, " x ", s.channels);
  const Pool pool = make_pool(op, s);
  const DeviceGuard guard(x_in);
  guard.check_same(op, "indices", indices_in);
  const Tensor x = dense_in(x_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array input(x), index(indices);
  Output y = empty_planes(guard, s, true, input.dtype);
  if (Array(y.tensor).numel() == 0) return std::move(y.tensor);
  bool flat = index.dtype == Dtype::kInt64;
  Backward b{input.data, index.data, y.data, flat, pool, guard.stream(), op};
  PYDL_CUDA_FLOAT_SWITCH(input.dtype, launch_gather<T>(b));
  return std::move(y.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("max_pool_bwd", TORCH_BOX(&max_pool_bwd));
  m.impl("max_pool_gather", TORCH_BOX(&max_pool_gather));
}

}  // namespace pydl
