// What the files of group normalisation share: the shape, how its sums are split, activations, and the walk over all
// values that the forward and the backward's dx have in common.
//
// n values of b bytes: the forward reads x twice, for the statistics and for y, and writes y: 3 b n bytes at most, 2 b
// n where the second reading finds x in the cache, and about 7 n operations; the backward moves 5 b n bytes or 3 b n,
// with about 12 n operations. Contiguous, a group of a sample is one run of memory, and its statistics are batch
// normalisation's with the groups of all samples as channels. Channels last, blocks take tiles of channels and rows of
// one sample, and channels are merged into groups. Everything is split by the shape alone and merged in a fixed order.
#pragma once

#include "cuda/batch_norm.h"

namespace pydl {

struct GroupShape {
  int64_t samples, channels, inner, groups, width;  // width: channels of a group
  bool rows;                                        // channels last

  // Channels fit 32 bits, in which a division is cheap.
  __device__ int64_t group_of(int64_t c) const { return uint32_t(c) / uint32_t(width); }
  __host__ __device__ int64_t all_groups() const { return samples * groups; }
  __host__ __device__ int64_t planes() const { return samples * channels; }
  int64_t numel() const { return samples * channels * inner; }
};

// How the values of a channel of a sample (planes: items of V elements; rows: rows) are split over blocks.
struct GroupSplit {
  int splits;
  int64_t each;
  bool packs;  // elements in packs of kNormPack
};

struct GroupSums {
  const void *dy, *x, *mean, *var;  // statistics of the compute type
  NormParameter weight, bias;
  int activation;
  void *table, *dweight, *dbias;  // null if not wanted; rows of the table: along, slope, rstd
  double eps;
};

// Statistics of channels-last x: mean, var and the table of `final`, whose channels are the groups of all samples.
// `partial` holds samples x split.splits x 3 x channels values of the compute type.
void launch_group_statistics(const char* op, const void* x, Dtype dtype, const GroupShape& shape,
                             const GroupSplit& split, void* partial, const NormFinal& final, cudaStream_t stream);

// dweight, dbias and the table of the backward. `partial` holds samples x split.splits x 2 x channels values.
void launch_group_sums(const char* op, const GroupSums& args, Dtype dtype, const GroupShape& shape,
                       const GroupSplit& split, void* partial, cudaStream_t stream);

namespace {

enum Activation : int { kNone, kRelu, kSilu };

// The partial sums of a group of a sample that a lane of a warp reads: of split k and channel c of the group.
struct GroupWalk {
  int width, step_c, step_k, c, k;

  __device__ GroupWalk(const GroupShape& s, int lane) : width(int(s.width)) {
    step_k = kWarp / width;
    step_c = kWarp - step_k * width;
    k = lane / width;
    c = lane - k * width;
  }
  __device__ void next() {
    k += step_k;
    c += step_c;
    if (c >= width) {
      c -= width;
      ++k;
    }
  }
};

template <typename A>
__device__ __forceinline__ A sigmoid(A z) {
  return A(1) / (A(1) + A(exp(-z)));
}

template <typename A>
__device__ __forceinline__ A activate(A z, int activation) {
  if (activation == kRelu) return z <= A(0) ? A(0) : z;  // NaN stays
  return activation == kSilu ? z * sigmoid(z) : z;
}

// dy times the activation's derivative at z; relu's is 1 at NaN, as in torch.
template <typename A>
__device__ __forceinline__ A through(A dy, A z, int activation) {
  if (activation == kRelu) return z <= A(0) ? A(0) : dy;
  if (activation == kNone) return dy;
  A s = sigmoid(z);
  return dy * (s * (A(1) + z * (A(1) - s)));
}

// ---- values: Map has constants(n, c), what a channel of a sample has in common, and apply<V, STEP>(offset, k), V
// elements whose constants step by STEP

// Planes whose size is a multiple of 8, an item of 8 elements per thread.
template <typename Map>
__global__ void __launch_bounds__(kNormThreads) group_norm_planes_kernel(Map map, GroupShape s, uint64_t items) {
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t offset = int64_t(item) * kNormPack;
  take_digit(item, int(s.inner / kNormPack));
  int c = take_digit(item, int(s.channels));
  typename Map::Constants k = map.constants(int64_t(item), c);
  map.template apply<kNormPack, 0>(offset, &k);
}

// Rows of a multiple of 8 channels: a thread keeps the constants of 8 and walks down its block's rows of one sample.
template <typename Map>
__global__ void __launch_bounds__(kNormThreads)
    group_norm_rows_kernel(Map map, GroupShape s, unsigned tiles, unsigned blocks, int64_t block_rows) {
  unsigned b = blockIdx.x / tiles;
  int64_t n = b / blocks, first = int64_t(b % blocks) * block_rows, end = first + block_rows;
  int64_t c = (int64_t(blockIdx.x % tiles) * blockDim.x + threadIdx.x) * kNormPack;
  if (c >= s.channels) return;
  typename Map::Constants k[kNormPack];
#pragma unroll
  for (int j = 0; j < kNormPack; ++j) k[j] = map.constants(n, c + j);
  end = end < s.inner ? end : s.inner;
  for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
    map.template apply<kNormPack, 1>((n * s.inner + row) * s.channels + c, k);
  }
}

// Any size: an element per thread.
template <typename Map>
__global__ void __launch_bounds__(kNormThreads) group_norm_any_kernel(Map map, GroupShape s, uint64_t items) {
  uint64_t item = thread_item();
  if (item >= items) return;
  int64_t offset = int64_t(item);
  int c;
  if (s.rows) {
    c = take_digit(item, int(s.channels));
    take_digit(item, int(s.inner));
  } else {
    take_digit(item, int(s.inner));
    c = take_digit(item, int(s.channels));
  }
  typename Map::Constants k = map.constants(int64_t(item), c);
  map.template apply<1, 0>(offset, &k);
}

template <typename Map>
void launch_map(const char* op, const Map& map, const GroupShape& s, bool packs, cudaStream_t stream) {
  if (packs && s.rows) {
    constexpr int64_t kRowsOfThread = 8;
    const dim3 block = row_block(s.channels, kNormPack);
    const int64_t tiles = ceil_div(s.channels, int64_t(block.x) * kNormPack), rows = block.y * kRowsOfThread;
    const int64_t blocks = ceil_div(s.inner, rows);
    PYDL_LAUNCH(group_norm_rows_kernel<Map>, norm_grid(op, tiles * blocks * s.samples), block, 0, stream, map, s,
                unsigned(tiles), unsigned(blocks), rows);
    return;
  }
  const int64_t items = packs ? s.numel() / kNormPack : s.numel();
  const unsigned grid = norm_grid(op, ceil_div(items, int64_t(kNormThreads)));
  if (packs) {
    PYDL_LAUNCH(group_norm_planes_kernel<Map>, grid, kNormThreads, 0, stream, map, s, uint64_t(items));
  } else {
    PYDL_LAUNCH(group_norm_any_kernel<Map>, grid, kNormThreads, 0, stream, map, s, uint64_t(items));
  }
}

// ---- host

inline bool group_packs(const GroupShape& s, std::initializer_list<const void*> addresses) {
  if ((s.rows ? s.channels : s.inner) % kNormPack != 0) return false;
  for (const void* address : addresses) {
    if (!is_aligned(address, 16)) return false;
  }
  return true;
}

// A warp for a plane of up to so many items, else a block.
constexpr int64_t kWarpItems = 512;

// As many blocks as fill a large device some times over, none with less than a few items or rows for a thread.
inline GroupSplit split_of(const GroupShape& s, bool packs) {
  constexpr int64_t kBlocks = 1056, kMost = 128, kFew = 4;
  const int64_t pack = packs ? kNormPack : 1;
  int64_t work = s.inner, blocks = s.planes(), least = kNormThreads * kFew;
  if (s.rows) {
    const dim3 block = row_block(s.channels, int(pack));
    blocks = ceil_div(s.channels, int64_t(block.x) * pack) * s.samples;
    least = int64_t(block.y) * kFew;
  } else {
    work /= pack;
    if (work <= kWarpItems) return {1, work, packs};
  }
  const int64_t wanted = std::min(ceil_div(kBlocks, blocks), ceil_div(work, least));
  const int64_t each = ceil_div(work, std::clamp<int64_t>(wanted, 1, kMost));
  return {int(ceil_div(work, each)), each, packs};
}

// What the host functions know of x.
struct GroupCall {
  GroupCall(const char* name, const Array& x, int64_t groups, int64_t activation_) : norm(name, x) {
    STD_TORCH_CHECK(groups > 0 && x.sizes[1] % groups == 0, name, ": groups must divide the ", x.sizes[1],
                    " channels of x, got ", groups);
    STD_TORCH_CHECK(activation_ >= 0 && activation_ <= 2, name, ": activation must be 0, 1 or 2, got ", activation_);
    int64_t inner = 1;
    for (int64_t d = 2; d < x.dim; ++d) inner *= x.sizes[d];
    // one position: a group is a run of memory in either layout
    shape = {x.sizes[0], x.sizes[1],          inner,
             groups,     x.sizes[1] / groups, norm.layout.last && x.sizes[1] > 1 && inner > 1};
    STD_TORCH_CHECK(inner < int64_t(1) << 31, name, ": x is too large: ", inner, " positions");
    activation = int(activation_);
  }

  NormCall norm;
  GroupShape shape;
  int activation;
};

}  // namespace
}  // namespace pydl
