// What the files of batch normalisation share: parameters and packs on the device, cuts and launch shapes on the host.
//
// Planes (contiguous layout) and rows of channels (channels last) have kernels of their own, for 8 elements at a time
// where sizes and addresses allow and for single ones elsewhere. A channel is split over blocks by the shape alone;
// what the blocks found is merged in the order of the splits.
#pragma once

#include "common/channels.h"
#include "common/cuda_host.h"
#include "common/device_vec.h"
#include "common/indexing.h"
#include "common/warp.h"

namespace pydl {

constexpr int kNormThreads = 256;
// Elements of a thread's item: as many as a byte of the mask has bits.
constexpr int kNormPack = 8;

// One value per channel, of a floating dtype; absent if data is null.
struct NormParameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
};

// How a channel is split over blocks.
struct NormSplit {
  int splits;
  int64_t each;  // items of a channel (planes) or rows in a split
  bool packs;    // items of kNormPack elements
};

// Where the statistics of a channel go when they are known. Rows of the table: mean, scale, shift.
struct NormFinal {
  NormParameter weight, bias;
  void *mean, *var, *table;  // null if not wanted
  double eps;
};

// Statistics of x. `partial` holds split.splits x 3 x channels values of the compute type, none for one split.
void launch_norm_statistics(const char* op, const void* x, Dtype dtype, const Channels& shape, const NormSplit& split,
                            void* partial, const NormFinal& final, cudaStream_t stream);

struct NormSums {
  const void *dy, *x;
  const uint8_t* mask;
  NormParameter weight, mean, var;
  NormParameter mean_dy_xhat, mean_dy;  // given sums, divided by the number of values; absent otherwise
  void *dweight, *dbias, *table;        // null if not wanted; rows of the table: mean, along, slope, scale
  bool sums, training;                  // sums: whether they are to be found
  double eps;
};

// dweight, dbias and the table of the backward. `partial` holds split.splits x 2 x channels values of the compute type,
// none for one split.
void launch_norm_sums(const char* op, const NormSums& args, Dtype dtype, const Channels& shape, const NormSplit& split,
                      void* partial, cudaStream_t stream);

namespace {

using cuda_host::DeviceGuard;

template <typename A>
__device__ A read_parameter(const NormParameter& p, int64_t c, A absent) {
  if (p.data == nullptr) return absent;
  switch (p.dtype) {
    case Dtype::kDouble:
      return A(static_cast<const double*>(p.data)[c]);
    case Dtype::kHalf:
      return A(to_acc(static_cast<const __half*>(p.data)[c]));
    case Dtype::kBFloat16:
      return A(to_acc(static_cast<const __nv_bfloat16*>(p.data)[c]));
    default:
      return A(static_cast<const float*>(p.data)[c]);
  }
}

// V neighbouring elements; of 8, as 16-byte accesses.
template <int V, typename T>
__device__ __forceinline__ void load_values(const T* address, acc_t<T>* values) {
  if constexpr (V == 1) {
    values[0] = to_acc(*address);
  } else {
    constexpr int N = 16 / int(sizeof(T));
#pragma unroll
    for (int k = 0; k < V / N; ++k) {
      Pack<T, N> pack = load_pack<N>(address + k * N);
#pragma unroll
      for (int j = 0; j < N; ++j) values[k * N + j] = to_acc(pack.at[j]);
    }
  }
}

template <int V, typename T>
__device__ __forceinline__ void store_values(T* address, const acc_t<T>* values) {
  if constexpr (V == 1) {
    *address = from_acc<T>(values[0]);
  } else {
    constexpr int N = 16 / int(sizeof(T));
#pragma unroll
    for (int k = 0; k < V / N; ++k) {
      Pack<T, N> pack;
#pragma unroll
      for (int j = 0; j < N; ++j) pack.at[j] = from_acc<T>(values[k * N + j]);
      store_pack(address + k * N, pack);
    }
  }
}

// The items of V elements of one channel of planes that a thread of a block reads: every kNormThreads-th of a split's.
template <int V>
struct PlaneWalk {
  int64_t plane, at, per_plane, step_planes, step, left;

  __device__ PlaneWalk(const Channels& s, const NormSplit& split, int k) : per_plane(s.inner / V) {
    int64_t begin = k * split.each, end = begin + split.each, items = s.outer * per_plane;
    int64_t first = begin + threadIdx.x;
    end = end < items ? end : items;
    left = first < end ? (end - first + kNormThreads - 1) / kNormThreads : 0;
    plane = first / per_plane;
    at = first - plane * per_plane;
    step_planes = kNormThreads / per_plane;
    step = kNormThreads - step_planes * per_plane;
  }
  __device__ void next() {
    plane += step_planes;
    at += step;
    if (at >= per_plane) {
      at -= per_plane;
      ++plane;
    }
  }
};

// Element `lane` of a group of 32: of a plane, or of all rows laid end to end.
struct NormPlace {
  bool inside;
  int64_t offset, channel, byte;  // byte: of the mask
};

__device__ __forceinline__ NormPlace place_of(const Channels& s, bool rows, uint64_t group, int lane) {
  if (rows) {
    int64_t e = int64_t(group) * kWarp + lane;
    uint64_t rest = uint64_t(e);
    return {e < s.outer * s.channels, e, take_digit(rest, int(s.channels)), e / 8};
  }
  int64_t i = int64_t(take_digit(group, int(ceil_div(s.inner, int64_t(kWarp))))) * kWarp + lane;
  int64_t plane = int64_t(group);
  return {i < s.inner, plane * s.inner + i, take_digit(group, int(s.channels)), plane * ((s.inner + 7) / 8) + i / 8};
}

inline int64_t norm_groups(const Channels& s) {
  return s.rows() ? ceil_div(s.numel(), int64_t(kWarp)) : s.outer * s.channels * ceil_div(s.inner, int64_t(kWarp));
}

// Threads of a block over rows of channels: x over channels, as wide as a row is, up to a warp; y over rows.
inline dim3 row_block(int64_t channels, int pack) {
  unsigned width = 1;
  while (width < 32 && int64_t(width) * pack < channels) width *= 2;
  return dim3(width, kNormThreads / width);
}

// Whether items of 8 neighbouring elements are whole and aligned.
inline bool may_pack(const Channels& s, std::initializer_list<const void*> addresses) {
  if ((s.rows() ? s.channels : s.inner) % kNormPack != 0) return false;
  for (const void* address : addresses) {
    if (!is_aligned(address, 16)) return false;
  }
  return true;
}

// Enough blocks to fill a large device some times over, none with less than a few items for each thread.
inline NormSplit split_of(const Channels& s, bool packs) {
  constexpr int64_t kBlocks = 1056, kMost = 128, kFewItems = 4;
  const int64_t pack = packs ? kNormPack : 1;
  int64_t work, blocks, least;
  if (s.rows()) {
    const dim3 block = row_block(s.channels, int(pack));
    work = s.outer;
    blocks = ceil_div(s.channels, int64_t(block.x) * pack);
    least = int64_t(block.y) * kFewItems;
  } else {
    work = s.outer * (s.inner / pack);
    blocks = s.channels;
    least = kNormThreads * kFewItems;
  }
  const int64_t wanted = std::min(ceil_div(kBlocks, blocks), ceil_div(work, least));
  const int64_t splits = std::clamp<int64_t>(wanted, 1, kMost);
  const int64_t each = ceil_div(work, splits);
  return {int(ceil_div(work, each)), each, packs};
}

inline unsigned norm_grid(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxGridX, op, ": too many elements: ", blocks, " blocks");
  return unsigned(blocks);
}

// Blocks that walk down rows of packs: tiles of channels side by side, then groups of rows.
struct RowGrid {
  unsigned grid;
  dim3 block;
  unsigned tiles;
  int64_t block_rows;
};
inline RowGrid row_grid(const char* op, const Channels& s) {
  constexpr int64_t kRowsOfThread = 8;
  const dim3 block = row_block(s.channels, kNormPack);
  const int64_t tiles = ceil_div(s.channels, int64_t(block.x) * kNormPack), rows = block.y * kRowsOfThread;
  return {norm_grid(op, tiles * ceil_div(s.outer, rows)), block, unsigned(tiles), rows};
}

// Coordinates that the kernels keep in 32 bits.
inline void check_norm_sizes(const char* op, const Channels& s) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  STD_TORCH_CHECK(s.channels < kLimit && s.inner / kNormPack < kLimit, op, ": x is too large: ", s.channels,
                  " channels of ", s.inner, " positions");
}

inline Output norm_vector(const DeviceGuard& guard, int64_t n, Dtype dtype) {
  const int64_t one = 1;
  return guard.empty_strided(&n, &one, 1, dtype);
}
inline Output norm_like(const DeviceGuard& guard, const Layout& layout, Dtype dtype) {
  return guard.empty_strided(layout.sizes, layout.strides, layout.dim, dtype);
}

inline void clear([[maybe_unused]] const DeviceGuard& guard, const Output& out, int64_t bytes) {
  if (bytes == 0) return;
#ifdef PYDL_SIMT
  std::memset(out.data, 0, size_t(bytes));
#else
  check_cuda(cudaMemsetAsync(out.data, 0, size_t(bytes), guard.stream()), "cudaMemsetAsync");
#endif
}

// A result per channel; of an empty batch, zeros.
inline Output norm_statistic(const DeviceGuard& guard, const Channels& s, int64_t n, Dtype dtype) {
  Output out = norm_vector(guard, n, dtype);
  if (s.numel() == 0) clear(guard, out, n * host::size_of(dtype));
  return out;
}

// What the host functions know of x.
struct NormCall {
  NormCall(const char* name, const Array& x) : op(name), layout(name, x), dtype(x.dtype), shape(layout.channels()) {
    STD_TORCH_CHECK(host::is_floating(dtype), op, ": x must be float32, float64, float16 or bfloat16");
    check_norm_sizes(op, shape);
  }
  Dtype compute() const { return host::compute_dtype(dtype); }
  int64_t channels() const { return layout.sizes[1]; }

  const char* op;
  Layout layout;
  Dtype dtype;
  Channels shape;
};

// A parameter as contiguous memory; keeps a copy alive.
struct NormOperand {
  NormOperand(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels,
              const DeviceGuard& guard) {
    if (t.has_value()) *this = NormOperand(op, name, *t, channels, guard);
  }
  NormOperand(const char* op, const char* name, const Tensor& t, int64_t channels, const DeviceGuard& guard)
      : tensor(host::as_contiguous(t)) {
    const Array array(*tensor);
    STD_TORCH_CHECK(array.numel() == channels, op, ": ", name, " must have ", channels, " elements, got ",
                    array.numel());
    STD_TORCH_CHECK(host::is_floating(array.dtype), op, ": ", name, " must be floating point");
    guard.check_same(op, name, t);
    value = {array.data, array.dtype};
  }

  std::optional<Tensor> tensor;
  NormParameter value;
};

}  // namespace
}  // namespace pydl
