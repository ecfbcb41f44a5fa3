// Batch statistics. A thread takes mean and squared deviations of a few values at once, in registers, and merges them
// with what it has (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983): no digits are lost to
// a large mean, and no data is read twice. Threads, warps and splits are merged in a fixed order.
#include "cuda/batch_norm_moments.h"

namespace pydl {
namespace {

// Thread 0 gets the block merged.
template <typename A>
__device__ Moments<A> block_merge(Moments<A> m) {
  constexpr int kWarps = kNormThreads / kWarp;
  PYDL_SHARED(A, table, 3 * kWarps);
  m = warp_merge(m);
  int warp = int(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
    table[3 * warp] = m.n;
    table[3 * warp + 1] = m.mean;
    table[3 * warp + 2] = m.m2;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) m = merge(m, {table[3 * w], table[3 * w + 1], table[3 * w + 2]});
  }
  return m;
}

// The first value of a channel, which all others are taken less.
template <typename T>
__device__ __forceinline__ acc_t<T> shift_of(const T* x, const Channels& s, int64_t c) {
  return to_acc(x[c * s.inner]);
}

// Of one split: the end if there is no other, else into the splits' table.
template <typename A>
__device__ void put_moments(const NormFinal& f, A* partial, int split, int splits, int64_t c, int64_t channels, A shift,
                            const Moments<A>& m) {
  if (splits == 1) return write_final(f, c, channels, shift, m);
  partial += int64_t(split) * 3 * channels + c;
  partial[0] = m.n;
  partial[channels] = m.mean;
  partial[2 * channels] = m.m2;
}

// ---- kernels

// One block per channel and split; a thread takes U items of V elements at once.
template <typename T, int V, int U>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_plane_stats_kernel(const T* __restrict__ x, Channels s, NormSplit split, acc_t<T>* partial,
                                  NormFinal final) {
  using A = acc_t<T>;
  int64_t c = blockIdx.x / split.splits;
  int k = int(blockIdx.x % split.splits);
  A shift = shift_of(x, s, c);
  PlaneWalk<V> walk(s, split, k);
  Moments<A> m{0, 0, 0};
  for (; walk.left >= U; walk.left -= U) {
    A values[U * V];
#pragma unroll
    for (int u = 0; u < U; ++u, walk.next()) {
      load_values<V>(x + (walk.plane * s.channels + c) * s.inner + walk.at * V, values + u * V);
    }
    m = merge(m, moments_of(values, shift));
  }
  for (; walk.left > 0; --walk.left, walk.next()) {
    A values[V];
    load_values<V>(x + (walk.plane * s.channels + c) * s.inner + walk.at * V, values);
    m = merge(m, moments_of(values, shift));
  }
  m = block_merge(m);
  if (threadIdx.x == 0) put_moments(final, partial, k, split.splits, c, s.channels, shift, m);
}

// Blocks: x over tiles of channels, y over splits. A thread has V channels and every blockDim.y-th row.
template <typename T, int V, int R>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_row_stats_kernel(const T* __restrict__ x, Channels s, NormSplit split, acc_t<T>* partial,
                                NormFinal final) {
  using A = acc_t<T>;
  PYDL_SHARED(A, means, kNormThreads * V);
  PYDL_SHARED(A, squares, kNormThreads * V);
  PYDL_SHARED(A, counts, kNormThreads);
  int64_t c = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  int64_t row = blockIdx.y * split.each + threadIdx.y, end = blockIdx.y * split.each + split.each;
  end = end < s.outer ? end : s.outer;
  A n = 0, shift[V] = {}, mean[V] = {}, m2[V] = {};
  int64_t step = blockDim.y, stride = step * s.channels;
  if (c < s.channels) {
    load_values<V>(x + c, shift);
    for (; row + (R - 1) * step < end; row += R * step) {
      join_rows<R, V>(x + row * s.channels + c, stride, shift, n, mean, m2);
    }
    for (; row < end; row += step) join_rows<1, V>(x + row * s.channels + c, stride, shift, n, mean, m2);
  }
  int slot = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    means[slot * V + j] = mean[j];
    squares[slot * V + j] = m2[j];
  }
  counts[slot] = n;
  __syncthreads();
  // one thread for each channel of the tile
  int width = int(blockDim.x) * V;
  int64_t begin = int64_t(blockIdx.x) * width;
  for (int t = slot; t < width && begin + t < s.channels; t += kNormThreads) {
    Moments<A> m{0, 0, 0};
    for (int y = 0; y < int(blockDim.y); ++y) {
      int other = y * width + t;
      m = merge(m, {counts[other / V], means[other], squares[other]});
    }
    int64_t channel = begin + t;
    put_moments(final, partial, int(blockIdx.y), split.splits, channel, s.channels, shift_of(x, s, channel), m);
  }
}

// A warp per channel.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_combine_kernel(const T* __restrict__ x, Channels s, const acc_t<T>* __restrict__ partial, int splits,
                              NormFinal final) {
  using A = acc_t<T>;
  int64_t c = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, channels = s.channels;
  Moments<A> m{0, 0, 0};
  if (c < channels) {
    for (int k = int(threadIdx.x); k < splits; k += kWarp) {
      const A* from = partial + int64_t(k) * 3 * channels + c;
      m = merge(m, {from[0], from[channels], from[2 * channels]});
    }
  }
  m = warp_merge(m);
  if (threadIdx.x == 0 && c < channels) write_final(final, c, channels, shift_of(x, s, c), m);
}

// ---- launcher

template <typename T, bool PACKS>
void launch_splits(const char* op, const T* x, const Channels& s, const NormSplit& split, acc_t<T>* partial,
                   const NormFinal& final, cudaStream_t stream) {
  // so many elements at once that their division by a count costs little, and as many loads are under way
  constexpr int V = PACKS ? kNormPack : 1, U = PACKS ? 2 : 8, R = !PACKS ? 8 : sizeof(T) == 2 ? 4 : 2;
  if (s.rows()) {
    const dim3 block = row_block(s.channels, V);
    const dim3 grid(norm_grid(op, ceil_div(s.channels, int64_t(block.x) * V)), unsigned(split.splits));
    PYDL_LAUNCH((batch_norm_row_stats_kernel<T, V, R>), grid, block, 0, stream, x, s, split, partial, final);
  } else {
    const unsigned grid = norm_grid(op, s.channels * split.splits);
    PYDL_LAUNCH((batch_norm_plane_stats_kernel<T, V, U>), grid, kNormThreads, 0, stream, x, s, split, partial, final);
  }
  if (split.splits == 1) return;
  const dim3 block(kWarp, kNormThreads / kWarp);
  PYDL_LAUNCH(batch_norm_combine_kernel<T>, norm_grid(op, ceil_div(s.channels, int64_t(block.y))), block, 0, stream, x,
              s, partial, split.splits, final);
}

}  // namespace

void launch_norm_statistics(const char* op, const void* x, Dtype dtype, const Channels& shape, const NormSplit& split,
                            void* partial, const NormFinal& final, cudaStream_t stream) {
  PYDL_CUDA_FLOAT_SWITCH(dtype, {
    const T* values = static_cast<const T*>(x);
    auto* table = static_cast<acc_t<T>*>(partial);
    split.packs ? launch_splits<T, true>(op, values, shape, split, table, final, stream)
                : launch_splits<T, false>(op, values, shape, split, table, final, stream);
  });
}

}  // namespace pydl
