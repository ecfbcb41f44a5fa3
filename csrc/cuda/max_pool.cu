// Max pooling forward: each thread reads its windows once, vertical neighbours share row maxima in registers, indices
// are one byte per output. The kernels are memory-bound: the bytes are x once, y once, one offset per output.
#include "cuda/pool.h"

namespace pydl {
namespace {

// ---- kernels

template <typename C>
struct Best {
  C value;
  int tap;
};

// The rule of torch: a larger value or a NaN takes over, so of equal maxima the first and of several NaN the last wins.
// (max.NaN would be one instruction, but makes of -0 and 0 the second.)
template <bool INDEX, typename C>
__device__ __forceinline__ void take(Best<C>& best, C value, int tap) {
  bool wins = value > best.value || value != value;
  best.value = wins ? value : best.value;
  if constexpr (INDEX) best.tap = wins ? tap : best.tap;
}

// Any geometry, either layout, one output per thread. Exactly one of offsets and flat may be set.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_any_kernel(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ offsets,
                        int64_t* __restrict__ flat, Pool p, uint64_t outputs) {
  uint64_t item = thread_item();
  if (item >= outputs) return;
  const Extents in = inputs_of(p);
  Place at = place_of(p, item, outputs_of(p));
  Span<int> depths = inner_taps(p.d, at.d), rows = inner_taps(p.h, at.h), cols = inner_taps(p.w, at.w);
  int front = window_start(p.d, at.d), top = window_start(p.h, at.h), left = window_start(p.w, at.w);
  Best<acc_t<T>> best{-INFINITY, tap_number(p, depths.first, rows.first, cols.first)};
  for (int i = depths.first; i < depths.last; ++i) {
    for (int j = rows.first; j < rows.last; ++j) {
      for (int k = cols.first; k < cols.last; ++k) {
        int64_t pixel = pixel_of(in, front + i * p.d.dilation, top + j * p.h.dilation, left + k * p.w.dilation);
        take<true>(best, to_acc(x[offset_of(p, at.n, at.c, in.pixels(), pixel)]), tap_number(p, i, j, k));
      }
    }
  }
  y[item] = from_acc<T>(best.value);
  if (offsets != nullptr) offsets[item] = uint8_t(best.tap);
  if (flat != nullptr) {
    int k = best.tap % p.w.kernel, j = best.tap / p.w.kernel % p.h.kernel, i = best.tap / p.w.kernel / p.h.kernel;
    flat[item] = pixel_of(in, front + i * p.d.dilation, top + j * p.h.dilation, left + k * p.w.dilation);
  }
}

// Row maxima of COLS neighbouring windows: elements left of the chunk, the chunk itself, elements right of it.
template <typename T, bool INDEX, typename Win, int COLS>
__device__ __forceinline__ void pool_row(const T* __restrict__ row, bool inside, int col, int width,
                                         Best<float> (&best)[COLS]) {
  constexpr int kChunk = COLS * Win::S;
  constexpr int kRight = Win::K - Win::S > Win::P ? Win::K - Win::S - Win::P : 0;
  float span[Win::P + kChunk + kRight] = {};
#pragma unroll
  for (int i = 0; i < Win::P + kChunk + kRight; ++i) {
    bool from_vector = COLS > 1 && i >= Win::P && i < Win::P + kChunk;
    int at = col + i - Win::P;
    if (!from_vector) span[i] = inside && at >= 0 && at < width ? to_acc(row[at]) : -INFINITY;
  }
  if constexpr (COLS > 1) {
    Pack<T, kChunk> chunk;
    bool readable = inside && col < width;
    if (readable) chunk = load_pack<kChunk>(row + col);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) span[Win::P + i] = readable ? to_acc(chunk.at[i]) : -INFINITY;
  }
#pragma unroll
  for (int j = 0; j < COLS; ++j) {
    best[j] = {span[j * Win::S], 0};
#pragma unroll
    for (int tap = 1; tap < Win::K; ++tap) take<INDEX>(best[j], span[j * Win::S + tap], tap);
  }
}

template <typename T, bool INDEX, int COLS>
__device__ __forceinline__ void store_outputs(const Best<float> (&best)[COLS], T* y, uint8_t* offsets, int columns,
                                              bool vector) {
  Pack<T, COLS> values;
  Pack<uint8_t, COLS> taps;
#pragma unroll
  for (int j = 0; j < COLS; ++j) {
    values.at[j] = from_acc<T>(best[j].value);
    taps.at[j] = uint8_t(best[j].tap);
  }
  if (COLS > 1 && vector) {
    store_pack(y, values);
    if constexpr (INDEX) store_pack(offsets, taps);
    return;
  }
#pragma unroll
  for (int j = 0; j < COLS; ++j) {
    if (j >= columns) break;
    y[j] = values.at[j];
    if constexpr (INDEX) offsets[j] = taps.at[j];
  }
}

// Contiguous planes, unrolled windows. A thread walks down ROWS output rows of COLS columns and keeps the row maxima
// that the next output row shares. COLS > 1: chunks of COLS * S inputs are one aligned 16-byte load.
template <typename T, bool INDEX, typename Win, int COLS, int ROWS>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_window_kernel(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ offsets, Pool p,
                           uint64_t items, bool vector_out) {
  uint64_t item = thread_item();
  if (item >= items) return;
  int ow = take_digit(item, ceil_div(p.w.out, COLS)) * COLS;
  int oh = take_digit(item, ceil_div(p.h.out, ROWS)) * ROWS;
  x += int64_t(item) * p.h.in * p.w.in;
  int64_t out = (int64_t(item) * p.h.out + oh) * p.w.out + ow;
  int col = ow * Win::S, ih = oh * Win::S - Win::P;
  Best<float> rows[Win::K][COLS];
  constexpr int kShared = Win::K - Win::S;
#pragma unroll
  for (int i = 0; i < Win::K; ++i) {
    if (i < kShared) {
      pool_row<T, INDEX, Win, COLS>(x + int64_t(ih + i) * p.w.in, ih + i >= 0 && ih + i < p.h.in, col, p.w.in, rows[i]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r, ih += Win::S, out += p.w.out) {
    if (oh + r >= p.h.out) return;
#pragma unroll
    for (int i = kShared; i < Win::K; ++i) {
      pool_row<T, INDEX, Win, COLS>(x + int64_t(ih + i) * p.w.in, ih + i >= 0 && ih + i < p.h.in, col, p.w.in, rows[i]);
    }
    Best<float> best[COLS];
#pragma unroll
    for (int j = 0; j < COLS; ++j) {
      best[j] = {-INFINITY, max(0, -ih) * Win::K + max(0, Win::P - col - j * Win::S)};
#pragma unroll
      for (int i = 0; i < Win::K; ++i) take<INDEX>(best[j], rows[i][j].value, i * Win::K + rows[i][j].tap);
#pragma unroll
      for (int i = 0; i < kShared; ++i) rows[i][j] = rows[i + Win::S][j];
    }
    store_outputs<T, INDEX, COLS>(best, y + out, INDEX ? offsets + out : nullptr, p.w.out - ow, vector_out);
  }
}

// channels_last, any geometry: a thread holds 16 bytes of channels. KW: window width, 0 if known only at run time.
template <typename T, bool INDEX, int KW>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_channels_kernel(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ offsets, Pool p,
                             uint64_t items) {
  constexpr int N = kVectorBytes / int(sizeof(T));
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t out = int64_t(item) * N;
  int c = take_digit(item, p.channels / N) * N;
  int ow = take_digit(item, p.w.out), oh = take_digit(item, p.h.out), od = take_digit(item, p.d.out);
  Span<int> depths = inner_taps(p.d, od), rows = inner_taps(p.h, oh);
  int front = window_start(p.d, od), top = window_start(p.h, oh), left = window_start(p.w, ow);
  const int kernel = KW > 0 ? KW : p.w.kernel;
  x += int64_t(item) * inputs_of(p).pixels() * p.channels + c;
  Best<float> best[N];
#pragma unroll
  for (int n = 0; n < N; ++n) best[n] = {-INFINITY, tap_number(p, depths.first, rows.first, inner_taps(p.w, ow).first)};
  for (int i = depths.first; i < depths.last; ++i) {
    for (int j = rows.first; j < rows.last; ++j) {
      const T* row = x + pixel_of(inputs_of(p), front + i * p.d.dilation, top + j * p.h.dilation, 0) * p.channels;
#pragma unroll KW> 0 ? KW : 1
      for (int k = 0; k < kernel; ++k) {
        int col = left + k * p.w.dilation;
        if (col < 0 || col >= p.w.in) continue;
        Pack<T, N> pack = load_pack<N>(row + int64_t(col) * p.channels);
#pragma unroll
        for (int n = 0; n < N; ++n) take<INDEX>(best[n], to_acc(pack.at[n]), tap_number(p, i, j, k));
      }
    }
  }
  store_outputs<T, INDEX, N>(best, y + out, INDEX ? offsets + out : nullptr, N, true);
}

// ---- launchers

struct Forward {
  const void* x;
  void* y;
  void* indices;  // null: values only
  bool flat;
  Pool pool;
  cudaStream_t stream;
  const char* op;
};

template <typename T>
void launch_any(const Forward& f) {
  const Pool& p = f.pool;
  int64_t outputs = p.batch * p.channels * outputs_of(p).pixels();
  PYDL_LAUNCH(max_pool_any_kernel<T>, pool_grid(f.op, outputs), kPoolThreads, 0, f.stream, static_cast<const T*>(f.x),
              static_cast<T*>(f.y), f.flat ? nullptr : static_cast<uint8_t*>(f.indices),
              f.flat ? static_cast<int64_t*>(f.indices) : nullptr, p, uint64_t(outputs));
}

template <typename T, bool INDEX, typename Win, int COLS>
void launch_window(const Forward& f) {
  constexpr int kRows = 4;
  const Pool& p = f.pool;
  int64_t items = p.batch * p.channels * ceil_div(p.h.out, kRows) * ceil_div(p.w.out, COLS);
  bool vector_out = p.w.out % COLS == 0;
  PYDL_LAUNCH((max_pool_window_kernel<T, INDEX, Win, COLS, kRows>), pool_grid(f.op, items), kPoolThreads, 0, f.stream,
              static_cast<const T*>(f.x), static_cast<T*>(f.y), static_cast<uint8_t*>(f.indices), p, uint64_t(items),
              vector_out);
}

template <typename T, bool INDEX>
void launch_channels(const Forward& f) {
  const Pool& p = f.pool;
  int64_t items = p.batch * outputs_of(p).pixels() * (p.channels / (kVectorBytes / int(sizeof(T))));
  auto launch = [&]<int KW>() {
    PYDL_LAUNCH((max_pool_channels_kernel<T, INDEX, KW>), pool_grid(f.op, items), kPoolThreads, 0, f.stream,
                static_cast<const T*>(f.x), static_cast<T*>(f.y), static_cast<uint8_t*>(f.indices), p, uint64_t(items));
  };
  if (p.w.kernel == 3) return launch.template operator()<3>();
  if (p.w.kernel == 2) return launch.template operator()<2>();
  launch.template operator()<0>();
}

template <typename T, bool INDEX>
bool launch_contiguous(const Forward& f) {
  constexpr int N = kVectorBytes / int(sizeof(T));
  return with_window(f.pool, [&](auto window) {
    using Win = decltype(window);
    bool aligned = f.pool.w.in % N == 0 && is_aligned(f.x, kVectorBytes);
    aligned ? launch_window<T, INDEX, Win, N / Win::S>(f) : launch_window<T, INDEX, Win, 1>(f);
  });
}

template <typename T, bool INDEX>
void launch_forward(const Forward& f) {
  if constexpr (sizeof(T) <= 4) {
    bool packs = f.pool.channels % (kVectorBytes / int(sizeof(T))) == 0 && is_aligned(f.x, kVectorBytes);
    if (!f.flat && f.pool.channels_last && packs && !f.pool.w.adaptive) return launch_channels<T, INDEX>(f);
    if (!f.flat && !f.pool.channels_last && launch_contiguous<T, INDEX>(f)) return;
  }
  launch_any<T>(f);
}

// ---- host functions

struct Pooled {
  Output y;
  std::optional<Output> indices;
};

Pooled pool_forward(const char* op, const Tensor& x_in, const PoolShape& s, bool with_indices, bool flat) {
  const Pool pool = make_pool(op, s);
  const DeviceGuard guard(x_in);
  const Tensor x = dense_in(x_in, s.channels_last);
  const Array meta(x);
  Pooled out{empty_planes(guard, s, true, meta.dtype), std::nullopt};
  if (with_indices) out.indices = empty_planes(guard, s, true, flat ? Dtype::kInt64 : Dtype::kUInt8);
  if (Array(out.y.tensor).numel() == 0) return out;
  Forward f{meta.data, out.y.data, with_indices ? out.indices->data : nullptr, flat, pool, guard.stream(), op};
  PYDL_CUDA_FLOAT_SWITCH(meta.dtype, with_indices ? launch_forward<T, true>(f) : launch_forward<T, false>(f));
  return out;
}

Tensor max_pool_values(const Tensor& x, const Sizes& window, bool ceil_mode) {
  const char* const op = "max_pool_values";
  return std::move(pool_forward(op, x, forward_shape(op, x, window, ceil_mode), false, false).y.tensor);
}

std::tuple<Tensor, Tensor> max_pool_with_indices(const Tensor& x, const Sizes& window, bool ceil_mode, bool flat) {
  const char* const op = "max_pool_with_indices";
  const PoolShape s = forward_shape(op, x, window, ceil_mode);
  Pooled out = pool_forward(op, x, s, true, flat || !offsets_fit(s));
  return {std::move(out.y.tensor), std::move(out.indices->tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("max_pool_values", TORCH_BOX(&max_pool_values));
  m.impl("max_pool_with_indices", TORCH_BOX(&max_pool_with_indices));
}

}  // namespace pydl
