// Group normalisation, backward: of each channel of each sample the sums of dz, the gradient behind the activation, and
// of dz * (x - mean), over splits of its positions; from them the means over groups, and over samples the gradients of
// the parameters. Splits, channels and samples are added up in a fixed order.
#include "cuda/group_norm.h"

namespace pydl {
namespace {

template <typename T>
struct Input {
  using A = acc_t<T>;
  const T *dy, *x;
  GroupShape s;
  const A *mean, *var;
  NormParameter weight, bias;
  int activation;
  double eps;

  struct Constants {
    A mean, scale, shift;
  };
  __device__ __forceinline__ A rstd(int64_t i) const { return A(1) / A(sqrt(var[i] + A(eps))); }
  __device__ __forceinline__ Constants constants(int64_t n, int64_t c) const {
    int64_t i = n * s.groups + s.group_of(c);
    if (activation == kNone) return {mean[i], A(0), A(0)};
    return {mean[i], rstd(i) * read_parameter(weight, c, A(1)), read_parameter(bias, c, A(0))};
  }

  // Adds V elements to sums that step by STEP, as their constants do.
  template <int V, int STEP>
  __device__ __forceinline__ void add(int64_t offset, const Constants* k, A* total, A* along) const {
    A dz[V], d[V];
    load_values<V>(dy + offset, dz);
    load_values<V>(x + offset, d);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Constants& of = k[j * STEP];
      d[j] -= of.mean;
      dz[j] = through(dz[j], d[j] * of.scale + of.shift, activation);
      total[j * STEP] += dz[j];
      along[j * STEP] += dz[j] * d[j];
    }
  }
};

// The two sums of channel c of sample n in split k of the partial sums.
template <typename A>
__device__ __forceinline__ void put_partial(A* partial, const GroupShape& s, int splits, int64_t n, int64_t k,
                                            int64_t c, A total, A along) {
  partial += (n * splits + k) * 2 * s.channels + c;
  partial[0] = total;
  partial[s.channels] = along;
}

// ---- kernels

// Blocks: splits, then planes; as many planes as threadIdx.y counts, one warp for each, or one for the whole block.
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads)
    group_norm_plane_sums_kernel(Input<T> in, GroupSplit split, acc_t<T>* partial) {
  using A = acc_t<T>;
  const GroupShape& s = in.s;
  int64_t k = blockIdx.x % split.splits, plane = int64_t(blockIdx.x / split.splits) * blockDim.y + threadIdx.y;
  A total = 0, along = 0;
  uint64_t sample = uint64_t(plane);
  int64_t c = take_digit(sample, int(s.channels)), n = int64_t(sample);
  if (plane < s.planes()) {
    typename Input<T>::Constants constants = in.constants(n, c);
    int64_t end = (k + 1) * split.each, items = s.inner / V;
    end = end < items ? end : items;
    for (int64_t i = k * split.each + threadIdx.x; i < end; i += blockDim.x) {
      in.template add<V, 0>(plane * s.inner + i * V, &constants, &total, &along);
    }
  }
  if (blockDim.y == 1) {
    total = block_sum(total);
    along = block_sum(along);
  } else {
    total = warp_sum(total);
    along = warp_sum(along);
  }
  if (threadIdx.x == 0 && plane < s.planes()) put_partial(partial, s, split.splits, n, k, c, total, along);
}

// Blocks: tiles of channels, then splits, then samples. A thread has V channels and every blockDim.y-th row.
template <typename T, int V>
__global__ void __launch_bounds__(kNormThreads)
    group_norm_row_sums_kernel(Input<T> in, GroupSplit split, unsigned tiles, acc_t<T>* partial) {
  using A = acc_t<T>;
  PYDL_SHARED(A, totals, kNormThreads * V);
  PYDL_SHARED(A, alongs, kNormThreads * V);
  const GroupShape& s = in.s;
  unsigned b = blockIdx.x / tiles;
  int64_t n = b / split.splits, k = b % split.splits;
  int width = int(blockDim.x) * V;
  int64_t begin = int64_t(blockIdx.x % tiles) * width, c = begin + int64_t(threadIdx.x) * V;
  A total[V] = {}, along[V] = {};
  if (c < s.channels) {
    typename Input<T>::Constants constants[V];
#pragma unroll
    for (int j = 0; j < V; ++j) constants[j] = in.constants(n, c + j);
    int64_t end = (k + 1) * split.each;
    end = end < s.inner ? end : s.inner;
    for (int64_t row = k * split.each + threadIdx.y; row < end; row += blockDim.y) {
      in.template add<V, 1>((n * s.inner + row) * s.channels + c, constants, total, along);
    }
  }
  int slot = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    totals[slot * V + j] = total[j];
    alongs[slot * V + j] = along[j];
  }
  __syncthreads();
  // one thread for each channel of the tile
  for (int t = slot; t < width && begin + t < s.channels; t += kNormThreads) {
    A all_total = 0, all_along = 0;
    for (int y = 0; y < int(blockDim.y); ++y) {
      all_total += totals[y * width + t];
      all_along += alongs[y * width + t];
    }
    put_partial(partial, s, split.splits, n, k, begin + t, all_total, all_along);
  }
}

// A warp per group of a sample: along, slope and rstd.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    group_norm_slopes_kernel(Input<T> in, const acc_t<T>* __restrict__ partial, int splits, acc_t<T>* table) {
  using A = acc_t<T>;
  const GroupShape& s = in.s;
  int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, all = s.all_groups();
  A total = 0, along = 0;
  if (i < all) {
    uint64_t n = uint64_t(i);
    int64_t first = take_digit(n, int(s.groups)) * s.width;
    const A* of_group = partial + int64_t(n) * splits * 2 * s.channels + first;
    for (GroupWalk walk(s, int(threadIdx.x)); walk.k < splits; walk.next()) {
      const A* from = of_group + int64_t(walk.k) * 2 * s.channels + walk.c;
      A weight = read_parameter(in.weight, first + walk.c, A(1));
      total += weight * from[0];
      along += weight * from[s.channels];
    }
  }
  total = warp_sum(total);
  along = warp_sum(along);
  if (threadIdx.x != 0 || i >= all) return;
  A rstd = in.rstd(i), each = A(1) / A(s.width * s.inner);
  table[i] = total * each;
  table[all + i] = along * each * rstd * rstd;
  table[2 * all + i] = rstd;
}

// 32 channels per block, over samples and splits.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    group_norm_parameters_kernel(Input<T> in, const acc_t<T>* __restrict__ partial, int splits, acc_t<T>* dweight,
                                 acc_t<T>* dbias) {
  using A = acc_t<T>;
  PYDL_SHARED(A, totals, kNormThreads);
  PYDL_SHARED(A, alongs, kNormThreads);
  const GroupShape& s = in.s;
  int64_t c = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  A total = 0, along = 0;
  if (c < s.channels) {
    int64_t group = s.group_of(c);
    for (int64_t n = threadIdx.y; n < s.samples; n += blockDim.y) {
      A rstd = in.rstd(n * s.groups + group);
      for (int k = 0; k < splits; ++k) {
        const A* from = partial + (n * splits + k) * 2 * s.channels + c;
        total += from[0];
        along += from[s.channels] * rstd;
      }
    }
  }
  int slot = int(threadIdx.y) * kWarp + int(threadIdx.x);
  totals[slot] = total;
  alongs[slot] = along;
  __syncthreads();
  if (threadIdx.y != 0 || c >= s.channels) return;
  for (int y = 1; y < int(blockDim.y); ++y) {
    total += totals[y * kWarp + slot];
    along += alongs[y * kWarp + slot];
  }
  if (dbias != nullptr) dbias[c] = total;
  if (dweight != nullptr) dweight[c] = along;
}

// ---- launcher

template <typename T, bool PACKS>
void launch_sums(const char* op, const Input<T>& in, const GroupSums& args, const GroupSplit& split, acc_t<T>* partial,
                 cudaStream_t stream) {
  using A = acc_t<T>;
  constexpr int V = PACKS ? kNormPack : 1;
  const GroupShape& s = in.s;
  const dim3 warps(kWarp, kNormThreads / kWarp);
  if (s.rows) {
    const dim3 block = row_block(s.channels, V);
    const int64_t tiles = ceil_div(s.channels, int64_t(block.x) * V);
    PYDL_LAUNCH((group_norm_row_sums_kernel<T, V>), norm_grid(op, tiles * split.splits * s.samples), block, 0, stream,
                in, split, unsigned(tiles), partial);
  } else {
    const dim3 block = s.inner / V <= kWarpItems ? warps : dim3(kNormThreads, 1);
    PYDL_LAUNCH((group_norm_plane_sums_kernel<T, V>),
                norm_grid(op, ceil_div(s.planes(), int64_t(block.y)) * split.splits), block, 0, stream, in, split,
                partial);
  }
  PYDL_LAUNCH(group_norm_slopes_kernel<T>, norm_grid(op, ceil_div(s.all_groups(), int64_t(warps.y))), warps, 0, stream,
              in, partial, split.splits, static_cast<A*>(args.table));
  if (args.dweight == nullptr && args.dbias == nullptr) return;
  PYDL_LAUNCH(group_norm_parameters_kernel<T>, norm_grid(op, ceil_div(s.channels, int64_t(kWarp))), warps, 0, stream,
              in, partial, split.splits, static_cast<A*>(args.dweight), static_cast<A*>(args.dbias));
}

}  // namespace

void launch_group_sums(const char* op, const GroupSums& args, Dtype dtype, const GroupShape& shape,
                       const GroupSplit& split, void* partial, cudaStream_t stream) {
  PYDL_CUDA_FLOAT_SWITCH(dtype, {
    using A = acc_t<T>;
    const Input<T> in{static_cast<const T*>(args.dy),
                      static_cast<const T*>(args.x),
                      shape,
                      static_cast<const A*>(args.mean),
                      static_cast<const A*>(args.var),
                      args.weight,
                      args.bias,
                      args.activation,
                      args.eps};
    split.packs ? launch_sums<T, true>(op, in, args, split, static_cast<A*>(partial), stream)
                : launch_sums<T, false>(op, in, args, split, static_cast<A*>(partial), stream);
  });
}

}  // namespace pydl
