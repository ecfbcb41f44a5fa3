// Batch normalisation, backward: per channel the sums of dz, the gradient behind the activation's mask, and of
// dz * (x - mean), over the splits of a channel and then over splits in their order.
#include "cuda/batch_norm.h"

namespace pydl {
namespace {

template <typename T>
struct Input {
  const T *dy, *x;
  const uint8_t* mask;  // null if there was no activation
};

template <typename A>
struct Pair {
  A total, along;
};

// Thread 0 gets the sums of the block.
template <typename A>
__device__ Pair<A> block_pair(Pair<A> sums) {
  return {block_sum(sums.total), block_sum(sums.along)};
}

template <typename A>
__device__ void write_sums(const NormSums& f, int64_t c, int64_t channels, int64_t count, Pair<A> sums) {
  A rstd = A(1) / A(sqrt(read_parameter(f.var, c, A(1)) + A(f.eps)));
  A mean = read_parameter(f.mean, c, A(0)), weight = read_parameter(f.weight, c, A(1));
  if (f.dbias != nullptr) static_cast<A*>(f.dbias)[c] = sums.total;
  if (f.dweight != nullptr) static_cast<A*>(f.dweight)[c] = sums.along * rstd;
  A each = A(1) / A(count);
  Pair<A> average{sums.total * each, sums.along * each * rstd * rstd};
  if (f.mean_dy.data != nullptr) {
    average = {read_parameter(f.mean_dy, c, A(0)), read_parameter(f.mean_dy_xhat, c, A(0)) * rstd};
  }
  A* table = static_cast<A*>(f.table);
  table[c] = mean;
  table[channels + c] = average.total;
  table[2 * channels + c] = average.along;
  table[3 * channels + c] = weight * rstd;
}

template <typename A>
__device__ void put_sums(const NormSums& f, A* partial, int split, int splits, int64_t c, const Channels& s,
                         Pair<A> sums) {
  if (splits == 1) return write_sums(f, c, s.channels, s.outer * s.inner, sums);
  partial += int64_t(split) * 2 * s.channels + c;
  partial[0] = sums.total;
  partial[s.channels] = sums.along;
}

// V elements of dy behind the mask's bits. `bits` is the byte they lie in, `bit` the first one's place there.
template <int V, typename T>
__device__ __forceinline__ void load_dz(const Input<T>& in, int64_t offset, int64_t byte, int bit, acc_t<T>* dz) {
  load_values<V>(in.dy + offset, dz);
  if (in.mask == nullptr) return;
  unsigned bits = unsigned(in.mask[byte]) >> bit;
#pragma unroll
  for (int j = 0; j < V; ++j) dz[j] = bits >> j & 1u ? dz[j] : acc_t<T>(0);
}

// ---- kernels

// One block per channel and split; U items of V elements are loaded at once.
template <typename T, int V, int U>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_plane_sums_kernel(Input<T> in, Channels s, NormSplit split, acc_t<T>* partial, NormSums final) {
  using A = acc_t<T>;
  int64_t c = blockIdx.x / split.splits;
  int k = int(blockIdx.x % split.splits);
  A mean = read_parameter(final.mean, c, A(0));
  PlaneWalk<V> walk(s, split, k);
  int64_t plane_bytes = (s.inner + 7) / 8;
  A total[U] = {}, along[U] = {};
  for (; walk.left > 0; walk.left -= U) {
    A dz[U][V], x[U][V];
#pragma unroll
    for (int u = 0; u < U; ++u, walk.next()) {
      if (u >= walk.left) break;
      int64_t plane = walk.plane * s.channels + c, i = walk.at * V;
      load_dz<V>(in, plane * s.inner + i, plane * plane_bytes + i / 8, int(i % 8), dz[u]);
      load_values<V>(in.x + plane * s.inner + i, x[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u >= walk.left) break;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        total[u] += dz[u][j];
        along[u] += dz[u][j] * (x[u][j] - mean);
      }
    }
  }
  Pair<A> sums{0, 0};
#pragma unroll
  for (int u = 0; u < U; ++u) sums = {sums.total + total[u], sums.along + along[u]};
  sums = block_pair(sums);
  if (threadIdx.x == 0) put_sums(final, partial, k, split.splits, c, s, sums);
}

// R rows at once.
template <int R, int V, typename T>
__device__ __forceinline__ void add_rows(const Input<T>& in, int64_t offset, int64_t stride, const acc_t<T> (&mean)[V],
                                         acc_t<T> (&total)[V], acc_t<T> (&along)[V]) {
  acc_t<T> dz[R][V], x[R][V];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    int64_t e = offset + r * stride;
    load_dz<V>(in, e, e / 8, int(e % 8), dz[r]);
    load_values<V>(in.x + e, x[r]);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      total[j] += dz[r][j];
      along[j] += dz[r][j] * (x[r][j] - mean[j]);
    }
  }
}

// Blocks: x over tiles of channels, y over splits. A thread has V channels and every blockDim.y-th row.
template <typename T, int V, int R>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_row_sums_kernel(Input<T> in, Channels s, NormSplit split, acc_t<T>* partial, NormSums final) {
  using A = acc_t<T>;
  PYDL_SHARED(A, totals, kNormThreads * V);
  PYDL_SHARED(A, alongs, kNormThreads * V);
  int64_t c = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  int64_t row = blockIdx.y * split.each + threadIdx.y, end = blockIdx.y * split.each + split.each;
  end = end < s.outer ? end : s.outer;
  A mean[V] = {}, total[V] = {}, along[V] = {};
  int64_t step = blockDim.y, stride = step * s.channels;
  if (c < s.channels) {
#pragma unroll
    for (int j = 0; j < V; ++j) mean[j] = read_parameter(final.mean, c + j, A(0));
    for (; row + (R - 1) * step < end; row += R * step) {
      add_rows<R, V>(in, row * s.channels + c, stride, mean, total, along);
    }
    for (; row < end; row += step) add_rows<1, V>(in, row * s.channels + c, stride, mean, total, along);
  }
  int slot = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    totals[slot * V + j] = total[j];
    alongs[slot * V + j] = along[j];
  }
  __syncthreads();
  // one thread for each channel of the tile
  int width = int(blockDim.x) * V;
  int64_t begin = int64_t(blockIdx.x) * width;
  for (int t = slot; t < width && begin + t < s.channels; t += kNormThreads) {
    Pair<A> sums{0, 0};
    for (int y = 0; y < int(blockDim.y); ++y) {
      sums = {sums.total + totals[y * width + t], sums.along + alongs[y * width + t]};
    }
    put_sums(final, partial, int(blockIdx.y), split.splits, begin + t, s, sums);
  }
}

// A warp per channel; without splits, only the table.
template <typename A>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_sums_combine_kernel(const A* __restrict__ partial, int splits, Channels s, NormSums final) {
  int64_t c = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  Pair<A> sums{0, 0};
  if (c < s.channels) {
    for (int k = int(threadIdx.x); k < splits; k += kWarp) {
      const A* from = partial + int64_t(k) * 2 * s.channels + c;
      sums = {sums.total + from[0], sums.along + from[s.channels]};
    }
  }
  sums = {warp_sum(sums.total), warp_sum(sums.along)};
  if (threadIdx.x == 0 && c < s.channels) write_sums(final, c, s.channels, s.outer * s.inner, sums);
}

// ---- launcher

template <typename T, bool PACKS>
void launch_splits(const char* op, const Input<T>& in, const Channels& s, const NormSplit& split, acc_t<T>* partial,
                   const NormSums& final, cudaStream_t stream) {
  constexpr int V = PACKS ? kNormPack : 1, U = PACKS ? 2 : 4, R = PACKS ? 2 : 4;
  if (s.rows()) {
    const dim3 block = row_block(s.channels, V);
    const dim3 grid(norm_grid(op, ceil_div(s.channels, int64_t(block.x) * V)), unsigned(split.splits));
    PYDL_LAUNCH((batch_norm_row_sums_kernel<T, V, R>), grid, block, 0, stream, in, s, split, partial, final);
  } else {
    const unsigned grid = norm_grid(op, s.channels * split.splits);
    PYDL_LAUNCH((batch_norm_plane_sums_kernel<T, V, U>), grid, kNormThreads, 0, stream, in, s, split, partial, final);
  }
}

}  // namespace

void launch_norm_sums(const char* op, const NormSums& args, Dtype dtype, const Channels& shape, const NormSplit& split,
                      void* partial, cudaStream_t stream) {
  const int splits = args.sums ? split.splits : 0;
  PYDL_CUDA_FLOAT_SWITCH(dtype, {
    auto* table = static_cast<acc_t<T>*>(partial);
    if (args.sums) {
      const Input<T> in{static_cast<const T*>(args.dy), static_cast<const T*>(args.x), args.mask};
      split.packs ? launch_splits<T, true>(op, in, shape, split, table, args, stream)
                  : launch_splits<T, false>(op, in, shape, split, table, args, stream);
    }
    if (splits != 1) {
      const dim3 block(kWarp, kNormThreads / kWarp);
      const unsigned grid = norm_grid(op, ceil_div(shape.channels, int64_t(block.y)));
      PYDL_LAUNCH(batch_norm_sums_combine_kernel<acc_t<T>>, grid, block, 0, stream, table, splits, shape, args);
    }
  });
}

}  // namespace pydl
