// Statistics of groups of channels-last values: of the channels of a sample over splits of its rows, then channels and
// splits merged in their order.
#include "cuda/batch_norm_moments.h"
#include "cuda/group_norm.h"

namespace pydl {
namespace {

// The first value of a group, which all others are taken less.
template <typename T>
__device__ __forceinline__ acc_t<T> group_shift(const T* x, const GroupShape& s, int64_t n, int64_t g) {
  return to_acc(x[n * s.inner * s.channels + g * s.width]);
}

// Blocks: tiles of channels, then splits, then samples. A thread has V channels and every blockDim.y-th row.
template <typename T, int V, int R>
__global__ void __launch_bounds__(kNormThreads)
    group_norm_row_stats_kernel(const T* __restrict__ x, GroupShape s, GroupSplit split, unsigned tiles,
                                acc_t<T>* partial) {
  using A = acc_t<T>;
  PYDL_SHARED(A, means, kNormThreads * V);
  PYDL_SHARED(A, squares, kNormThreads * V);
  PYDL_SHARED(A, counts, kNormThreads);
  unsigned b = blockIdx.x / tiles;
  int64_t n = b / split.splits, k = b % split.splits, base = n * s.inner * s.channels;
  int width = int(blockDim.x) * V;
  int64_t begin = int64_t(blockIdx.x % tiles) * width, c = begin + int64_t(threadIdx.x) * V;
  int64_t row = k * split.each + threadIdx.y, end = k * split.each + split.each;
  end = end < s.inner ? end : s.inner;
  A count = 0, shift[V] = {}, mean[V] = {}, m2[V] = {};
  int64_t step = blockDim.y, stride = step * s.channels;
  if (c < s.channels) {
#pragma unroll
    for (int j = 0; j < V; ++j) shift[j] = group_shift(x, s, n, s.group_of(c + j));
    for (; row + (R - 1) * step < end; row += R * step) {
      join_rows<R, V>(x + base + row * s.channels + c, stride, shift, count, mean, m2);
    }
    for (; row < end; row += step) {
      join_rows<1, V>(x + base + row * s.channels + c, stride, shift, count, mean, m2);
    }
  }
  int slot = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    means[slot * V + j] = mean[j];
    squares[slot * V + j] = m2[j];
  }
  counts[slot] = count;
  __syncthreads();
  // one thread for each channel of the tile
  partial += (n * split.splits + k) * 3 * s.channels;
  for (int t = slot; t < width && begin + t < s.channels; t += kNormThreads) {
    Moments<A> m{0, 0, 0};
    for (int y = 0; y < int(blockDim.y); ++y) {
      int other = y * width + t;
      m = merge(m, {counts[other / V], means[other], squares[other]});
    }
    partial[begin + t] = m.n;
    partial[s.channels + begin + t] = m.mean;
    partial[2 * s.channels + begin + t] = m.m2;
  }
}

// A warp per group of a sample.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    group_norm_combine_kernel(const T* __restrict__ x, GroupShape s, const acc_t<T>* __restrict__ partial, int splits,
                              NormFinal final) {
  using A = acc_t<T>;
  int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  uint64_t n = uint64_t(i);
  int64_t g = take_digit(n, int(s.groups));
  Moments<A> m{0, 0, 0};
  if (i < s.all_groups()) {
    const A* of_group = partial + int64_t(n) * splits * 3 * s.channels + g * s.width;
    for (GroupWalk walk(s, int(threadIdx.x)); walk.k < splits; walk.next()) {
      const A* from = of_group + int64_t(walk.k) * 3 * s.channels + walk.c;
      m = merge(m, {from[0], from[s.channels], from[2 * s.channels]});
    }
  }
  m = warp_merge(m);
  if (threadIdx.x == 0 && i < s.all_groups())
    write_final(final, i, s.all_groups(), group_shift(x, s, int64_t(n), g), m);
}

template <typename T, bool PACKS>
void launch_statistics(const char* op, const T* x, const GroupShape& s, const GroupSplit& split, acc_t<T>* partial,
                       const NormFinal& final, cudaStream_t stream) {
  constexpr int V = PACKS ? kNormPack : 1, R = PACKS ? 2 : 8;
  const dim3 block = row_block(s.channels, V);
  const int64_t tiles = ceil_div(s.channels, int64_t(block.x) * V);
  PYDL_LAUNCH((group_norm_row_stats_kernel<T, V, R>), norm_grid(op, tiles * split.splits * s.samples), block, 0, stream,
              x, s, split, unsigned(tiles), partial);
  const dim3 warps(kWarp, kNormThreads / kWarp);
  PYDL_LAUNCH(group_norm_combine_kernel<T>, norm_grid(op, ceil_div(s.all_groups(), int64_t(warps.y))), warps, 0, stream,
              x, s, partial, split.splits, final);
}

}  // namespace

void launch_group_statistics(const char* op, const void* x, Dtype dtype, const GroupShape& shape,
                             const GroupSplit& split, void* partial, const NormFinal& final, cudaStream_t stream) {
  PYDL_CUDA_FLOAT_SWITCH(dtype, {
    const T* values = static_cast<const T*>(x);
    auto* table = static_cast<acc_t<T>*>(partial);
    split.packs ? launch_statistics<T, true>(op, values, shape, split, table, final, stream)
                : launch_statistics<T, false>(op, values, shape, split, table, final, stream);
  });
}

}  // namespace pydl
