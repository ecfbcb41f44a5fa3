// Local response normalisation. Blocks take tiles of channels by positions, with the channels that windows reach
// beyond, into shared memory: memory is read once, whichever of the two is innermost. Windows too wide for that are
// summed element by element.
#include "common/cuda_host.h"
#include "common/response_norm.h"
#include "common/shared.h"

namespace pydl {
namespace {

using cuda_host::DeviceGuard;

constexpr int kLrnThreads = 256;
constexpr int kWidestTile = 33;  // with wider windows a tile would be mostly margin

// ---- kernels

template <bool ROOTS, typename A>
__device__ __forceinline__ A factor_of(A base, A minus_beta) {
  if constexpr (ROOTS && sizeof(A) == 4) {
    // Estimates, and one step of Newton's method for z^-4 = base^3; of 0 and inf the estimate is exact.
    A root = rsqrtf(base), z = root * (root * rsqrtf(root)), quarter = z * base;
    A better = z + z * (0.25f - 0.25f * (quarter * quarter * (z * quarter)));
    return better != better ? root : better;
  } else if constexpr (ROOTS) {
    A root = sqrt(base);
    return A(1) / (root * sqrt(root));
  } else if constexpr (sizeof(A) == 4) {
    return powf(base, minus_beta);
  } else {
    return pow(base, minus_beta);
  }
}

template <bool ROOTS, typename A>
struct Denominator {
  A scale, k, minus_beta;
  __device__ A base(A squares) const { return squares * scale + k; }
  __device__ A factor(A base) const { return factor_of<ROOTS>(base, minus_beta); }
};

// Threads run along what is innermost in memory. slots: channels of the tile and of its margins.
template <bool LAST>
struct Tile {
  static constexpr int kChannels = LAST ? 128 : 32, kPositions = LAST ? 8 : 32;

  __device__ Tile(const ResponseNorm& norm, int64_t block) : norm(norm) {
    const Channels& s = norm.shape;
    int64_t bands = ceil_div(s.channels, int64_t(kChannels));
    first = block % bands * kChannels;
    int64_t strip = block / bands;
    if constexpr (LAST) {
      position = strip * kPositions;
      base = position * s.channels;
      room = s.outer - position;
    } else {
      int64_t strips = ceil_div(s.inner, int64_t(kPositions));
      position = strip % strips * kPositions;
      base = strip / strips * s.channels * s.inner + position;
      room = s.inner - position;
    }
  }
  // Calls f(at, slot, offset) for every element of a tile with `margin` more channels before it, `slots` in all; `at`
  // numbers them, offset is -1 outside the tensor.
  template <typename F>
  __device__ __forceinline__ void each(int margin, int slots, F f) const {
    for (int at = int(threadIdx.x); at < slots * kPositions; at += kLrnThreads) {
      int slot = LAST ? at % slots : at / kPositions, p = LAST ? at / slots : at % kPositions;
      int64_t c = first - margin + slot;
      bool inside = c >= 0 && c < norm.shape.channels && p < room;
      f(slot, p, inside ? base + (LAST ? p * norm.shape.channels + c : c * norm.shape.inner + p) : -1);
    }
  }
  __device__ static int at(int slot, int p, int slots) { return LAST ? p * slots + slot : slot * kPositions + p; }

  const ResponseNorm& norm;
  int64_t first, position, base, room;
};

template <typename T, bool LAST, bool ROOTS>
__global__ void __launch_bounds__(kLrnThreads)
    lrn_fwd_tile_kernel(const T* __restrict__ x, T* __restrict__ y, ResponseNorm norm,
                        Denominator<ROOTS, acc_t<T>> denominator) {
  using A = acc_t<T>;
  PYDL_DYN_SHARED(A, values);
  Tile<LAST> tile(norm, blockIdx.x);
  const int before = int(norm.before), window = int(norm.window), slots = tile.kChannels + window - 1;
  tile.each(before, slots, [&](int slot, int p, int64_t offset) {
    values[tile.at(slot, p, slots)] = offset >= 0 ? to_acc(x[offset]) : A(0);
  });
  __syncthreads();
  tile.each(0, tile.kChannels, [&](int slot, int p, int64_t offset) {
    if (offset < 0) return;
    A total = 0;
    for (int j = 0; j < window; ++j) {
      A v = values[tile.at(slot + j, p, slots)];
      total += v * v;
    }
    y[offset] = from_acc<T>(values[tile.at(slot + before, p, slots)] * denominator.factor(denominator.base(total)));
  });
}

// dx_i = dy_i s_i^-beta - slope x_i * sum over c in [i - after, i + before] of r_c, r = dy x s^(-beta - 1).
template <typename T, bool LAST, bool ROOTS>
__global__ void __launch_bounds__(kLrnThreads)
    lrn_bwd_tile_kernel(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx, ResponseNorm norm,
                        Denominator<ROOTS, acc_t<T>> denominator, acc_t<T> slope) {
  using A = acc_t<T>;
  PYDL_DYN_SHARED(A, values);
  Tile<LAST> tile(norm, blockIdx.x);
  const int before = int(norm.before), after = int(norm.after), window = int(norm.window);
  const int r_slots = tile.kChannels + window - 1, slots = r_slots + window - 1;
  A *r = values + slots * tile.kPositions, *factors = r + r_slots * tile.kPositions;
  tile.each(before + after, slots, [&](int slot, int p, int64_t offset) {
    values[tile.at(slot, p, slots)] = offset >= 0 ? to_acc(x[offset]) : A(0);
  });
  __syncthreads();
  tile.each(after, r_slots, [&](int slot, int p, int64_t offset) {
    A term = 0, factor = 0;
    if (offset >= 0) {
      A total = 0;
      for (int j = 0; j < window; ++j) {
        A v = values[tile.at(slot + j, p, slots)];
        total += v * v;
      }
      A base = denominator.base(total);
      factor = denominator.factor(base);
      term = to_acc(dy[offset]) * values[tile.at(slot + before, p, slots)] * (factor / base);
    }
    r[tile.at(slot, p, r_slots)] = term;
    factors[tile.at(slot, p, r_slots)] = factor;
  });
  __syncthreads();
  tile.each(0, tile.kChannels, [&](int slot, int p, int64_t offset) {
    if (offset < 0) return;
    A total = 0;
    for (int j = 0; j < window; ++j) total += r[tile.at(slot + j, p, r_slots)];
    A own = to_acc(dy[offset]) * factors[tile.at(slot + after, p, r_slots)];
    dx[offset] = from_acc<T>(own - values[tile.at(slot + before + after, p, slots)] * slope * total);
  });
}

// One element: its channel, and where that of channel 0 lies.
struct Place {
  int64_t channel, start, stride;
};

__device__ inline Place place_of(const Channels& s, int64_t item) {
  int64_t channel = item / s.inner % s.channels;
  return {channel, item - channel * s.inner, s.inner};
}

template <typename T>
__device__ acc_t<T> squares_around(const T* x, const ResponseNorm& norm, const Place& at) {
  acc_t<T> total = 0;
  int64_t last = min(norm.shape.channels - 1, at.channel + norm.after);
  for (int64_t c = max(int64_t(0), at.channel - norm.before); c <= last; ++c) {
    acc_t<T> v = to_acc(x[at.start + c * at.stride]);
    total += v * v;
  }
  return total;
}

// y, or with dy the terms r of the backward.
template <typename T, typename Out, bool ROOTS>
__global__ void __launch_bounds__(kLrnThreads)
    lrn_wide_kernel(const T* __restrict__ x, const T* __restrict__ dy, Out* __restrict__ out, int64_t items,
                    ResponseNorm norm, Denominator<ROOTS, acc_t<T>> denominator) {
  using A = acc_t<T>;
  int64_t item = int64_t(blockIdx.x) * kLrnThreads + threadIdx.x;
  if (item >= items) return;
  A base = denominator.base(squares_around(x, norm, place_of(norm.shape, item))), factor = denominator.factor(base);
  A value = to_acc(x[item]);
  out[item] = from_acc<Out>(dy == nullptr ? value * factor : to_acc(dy[item]) * value * (factor / base));
}

template <typename T, bool ROOTS>
__global__ void __launch_bounds__(kLrnThreads)
    lrn_bwd_wide_kernel(const T* __restrict__ dy, const T* __restrict__ x, const acc_t<T>* __restrict__ r,
                        T* __restrict__ dx, int64_t items, ResponseNorm norm, Denominator<ROOTS, acc_t<T>> denominator,
                        acc_t<T> slope) {
  using A = acc_t<T>;
  int64_t item = int64_t(blockIdx.x) * kLrnThreads + threadIdx.x;
  if (item >= items) return;
  Place at = place_of(norm.shape, item);
  A total = 0;
  int64_t last = min(norm.shape.channels - 1, at.channel + norm.before);
  for (int64_t c = max(int64_t(0), at.channel - norm.after); c <= last; ++c) total += r[at.start + c * at.stride];
  A factor = denominator.factor(denominator.base(squares_around(x, norm, at)));
  dx[item] = from_acc<T>(to_acc(dy[item]) * factor - to_acc(x[item]) * slope * total);
}

// ---- launchers

struct Launch {
  const char* op;
  ResponseNorm norm;
  const void *dy, *x;  // dy: backward only
  void *out, *terms;   // terms: r of a wide backward
  cudaStream_t stream;
};

unsigned lrn_grid(const Launch& l, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxGridX, l.op, ": too many elements, ", l.norm.shape.numel());
  return unsigned(blocks);
}

template <typename T, bool LAST, bool ROOTS>
void launch_tiles(const Launch& l, const Denominator<ROOTS, acc_t<T>>& denominator, acc_t<T> slope) {
  using TileOf = Tile<LAST>;
  const Channels& s = l.norm.shape;
  int64_t strips =
      LAST ? ceil_div(s.outer, int64_t(TileOf::kPositions)) : s.outer * ceil_div(s.inner, int64_t(TileOf::kPositions));
  unsigned grid = lrn_grid(l, strips * ceil_div(s.channels, int64_t(TileOf::kChannels)));
  size_t margin = size_t(l.norm.window - 1), slots = TileOf::kChannels + margin;
  const T *x = static_cast<const T*>(l.x), *dy = static_cast<const T*>(l.dy);
  T* out = static_cast<T*>(l.out);
  if (dy == nullptr) {
    PYDL_LAUNCH((lrn_fwd_tile_kernel<T, LAST, ROOTS>), grid, kLrnThreads, slots * TileOf::kPositions * sizeof(acc_t<T>),
                l.stream, x, out, l.norm, denominator);
  } else {
    PYDL_LAUNCH((lrn_bwd_tile_kernel<T, LAST, ROOTS>), grid, kLrnThreads,
                (3 * slots + margin) * TileOf::kPositions * sizeof(acc_t<T>), l.stream, dy, x, out, l.norm, denominator,
                slope);
  }
}

template <typename T, bool ROOTS>
void launch_wide(const Launch& l, const Denominator<ROOTS, acc_t<T>>& denominator, acc_t<T> slope) {
  int64_t items = l.norm.shape.numel();
  unsigned grid = lrn_grid(l, ceil_div(items, int64_t(kLrnThreads)));
  const T *x = static_cast<const T*>(l.x), *dy = static_cast<const T*>(l.dy);
  T* out = static_cast<T*>(l.out);
  if (dy == nullptr) {
    PYDL_LAUNCH((lrn_wide_kernel<T, T, ROOTS>), grid, kLrnThreads, 0, l.stream, x, dy, out, items, l.norm, denominator);
    return;
  }
  acc_t<T>* terms = static_cast<acc_t<T>*>(l.terms);
  PYDL_LAUNCH((lrn_wide_kernel<T, acc_t<T>, ROOTS>), grid, kLrnThreads, 0, l.stream, x, dy, terms, items, l.norm,
              denominator);
  PYDL_LAUNCH((lrn_bwd_wide_kernel<T, ROOTS>), grid, kLrnThreads, 0, l.stream, dy, x, terms, out, items, l.norm,
              denominator, slope);
}

template <typename T, bool ROOTS>
void launch_power(const Launch& l) {
  using A = acc_t<T>;
  const Denominator<ROOTS, A> denominator{A(l.norm.scale), A(l.norm.k), A(-l.norm.beta)};
  const A slope = A(2 * l.norm.scale * l.norm.beta);
  if (l.norm.window > kWidestTile) {
    launch_wide<T>(l, denominator, slope);
  } else if (l.norm.shape.rows()) {
    launch_tiles<T, true>(l, denominator, slope);
  } else {
    launch_tiles<T, false>(l, denominator, slope);
  }
}

template <typename T>
void launch_lrn(const Launch& l) {
  l.norm.beta == 0.75 ? launch_power<T, true>(l) : launch_power<T, false>(l);
}

// ---- host functions

Tensor local_response_norm_fwd(const Tensor& x_in, int64_t size, double alpha, double beta, double k) {
  const char* const op = "local_response_norm_fwd";
  const Array meta(x_in);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const DeviceGuard guard(x_in);
  const Layout layout(op, meta);
  const Dense x = layout.dense_in(op, "x", x_in, meta, meta.dtype);
  Output y = guard.empty_strided(layout.sizes, layout.strides, layout.dim, meta.dtype);
  const ResponseNorm norm = response_norm(op, layout, size, alpha, beta, k);
  if (norm.shape.numel() > 0) {
    const Launch launch{op, norm, nullptr, x.data, y.data, nullptr, guard.stream()};
    PYDL_CUDA_FLOAT_SWITCH(meta.dtype, launch_lrn<T>(launch));
  }
  return std::move(y.tensor);
}

Tensor local_response_norm_bwd(const Tensor& dy_in, const Tensor& x_in, int64_t size, double alpha, double beta,
                               double k) {
  const char* const op = "local_response_norm_bwd";
  const Array meta(x_in);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const DeviceGuard guard(x_in);
  guard.check_same(op, "dy", dy_in);
  const Layout layout(op, meta);
  const Dense x = layout.dense_in(op, "x", x_in, meta, meta.dtype);
  const Dense dy = layout.dense_in(op, "dy", dy_in, meta.dtype);
  Output dx = guard.empty_strided(layout.sizes, layout.strides, layout.dim, meta.dtype);
  const ResponseNorm norm = response_norm(op, layout, size, alpha, beta, k);
  const int64_t numel = norm.shape.numel(), one = 1;
  if (numel > 0) {
    std::optional<Output> terms;
    if (norm.window > kWidestTile) terms = guard.empty_strided(&numel, &one, 1, host::compute_dtype(meta.dtype));
    const Launch launch{op, norm, dy.data, x.data, dx.data, terms.has_value() ? terms->data : nullptr, guard.stream()};
    PYDL_CUDA_FLOAT_SWITCH(meta.dtype, launch_lrn<T>(launch));
  }
  return std::move(dx.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("local_response_norm_fwd", TORCH_BOX(&local_response_norm_fwd));
  m.impl("local_response_norm_bwd", TORCH_BOX(&local_response_norm_bwd));
}

}  // namespace pydl
