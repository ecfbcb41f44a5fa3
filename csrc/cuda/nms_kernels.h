// The kernels of non-maximum suppression for any kind of box. Small images take one launch: a block sorts, settles and
// writes. Larger ones are sorted by torch, and the blocks of one cooperative launch share their segments.
#pragma once

#include <limits>

#include "cuda/nms.h"
#include "cuda/nms_order.h"

namespace pydl {
namespace {

constexpr int64_t kNmsOneBlock = 2048;  // the largest image, or class of one, that a single block settles
constexpr int kNmsTile = 128;           // positions among which a block looks for segments at a time

// Where results and intermediate values of all positions lie in device memory.
struct NmsBuffers {
  int64_t* indices;         // [images][most]
  int64_t* counts;          // [images]
  uint8_t* gone;            // by rank
  int64_t* sorted_classes;  // by position; null if there are none
  void* sorted_boxes;       // by position
};

// Sorts 2^k pairs in shared memory by key, equal keys by index (a bitonic network).
__device__ inline void sort_pairs(uint64_t* keys, uint16_t* index, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int pair = int(threadIdx.x); pair < n / 2; pair += kNmsThreads) {
        int low = pair / step * step * 2 + pair % step, high = low + step;
        bool ascends = (low & size) == 0;
        uint64_t a = keys[low], b = keys[high];
        uint16_t ia = index[low], ib = index[high];
        if ((a > b || (a == b && ia > ib)) != ascends) continue;
        keys[low] = b;
        keys[high] = a;
        index[low] = ib;
        index[high] = ia;
      }
    }
  }
  __syncthreads();
}

// One block for each image.
template <typename Geometry>
__global__ void __launch_bounds__(kNmsThreads, 1)
    nms_image_kernel(NmsCall call, NmsBuffers buffers, Geometry geometry, int padded) {
  PYDL_DYN_SHARED(uint64_t, keys);
  PYDL_SHARED(int, valid, 1);
  uint16_t* index = reinterpret_cast<uint16_t*>(keys + padded);
  using Box = typename Geometry::Box;
  // static and dynamic shared memory together: what a kernel may have without asking
  static_assert(kNmsChunk * (sizeof(Box) + sizeof(int64_t) + sizeof(int) + kNmsWords * sizeof(unsigned)) + 512 +
                    kNmsOneBlock * (sizeof(uint64_t) + sizeof(uint16_t)) <=
                48 * 1024);
  int64_t first = int64_t(blockIdx.x) * call.count;
  int count = int(call.count);
  if (threadIdx.x == 0) *valid = 0;
  for (int i = int(threadIdx.x); i < padded; i += kNmsThreads) {
    keys[i] = i < count ? score_key(call, first + i) : kNmsExcluded;
    index[i] = uint16_t(i);
  }
  sort_pairs(keys, index, padded);
  Box* boxes = static_cast<Box*>(buffers.sorted_boxes) + first;
  int64_t* classes = call.classes == nullptr ? nullptr : buffers.sorted_classes + first;
  uint8_t* gone = buffers.gone + first;
  for (int i = int(threadIdx.x); i < padded; i += kNmsThreads) {
    if (keys[i] == kNmsExcluded) continue;
    if (i + 1 == padded || keys[i + 1] == kNmsExcluded) *valid = i + 1;
    boxes[i] = Geometry::load(call.boxes, call.box_dtype, first + index[i]);
    if (classes != nullptr) classes[i] = call.classes[first + index[i]];
    gone[i] = 0;
  }
  __syncthreads();
  settle_segment(geometry, NmsSegment<Geometry>{boxes, classes, gone, nullptr, 0, *valid, call.most},
                 NmsTeam{0, 1, nullptr});
  __syncthreads();
  write_kept(
      gone, *valid, call.most, [&](int64_t rank) { return int64_t(index[rank]); },
      buffers.indices + int64_t(blockIdx.x) * call.most, buffers.counts + blockIdx.x);
}

// ---- larger images

// Long segments, in any order. The words count them, and then the arrivals at the barrier of each team of blocks.
struct NmsLong {
  int64_t* begins;
  int64_t* ends;
  unsigned* words;
};

__global__ void __launch_bounds__(kNmsSimple, 1)
    nms_classes_kernel(NmsCall call, const int64_t* __restrict__ order, int64_t* __restrict__ classes) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < call.images * call.count) classes[i] = call.classes[i / call.count * call.count + order[i]];
}

// The end of the segment that begins at `begin`; `classes` are sorted in each image.
__device__ inline int64_t segment_end(const NmsCall& call, const int64_t* classes, int64_t begin) {
  int64_t low = begin + 1, high = (begin / call.count + 1) * call.count;
  if (classes == nullptr) return high;
  int64_t own = classes[begin];
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (classes[middle] == own) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline bool segment_begins(const NmsCall& call, const int64_t* classes, int64_t position) {
  if (position % call.count == 0) return true;
  return classes != nullptr && classes[position] != classes[position - 1];
}

// Sorted: keys and the order they came from, by rank; classes and the ranks they came from, by position.
struct NmsSorted {
  const int64_t* keys;
  const int64_t* order;
  const int64_t* classes;
  const int64_t* ranks;
};

template <typename Geometry>
__global__ void __launch_bounds__(kNmsSimple, 1)
    nms_gather_kernel(NmsCall call, NmsBuffers buffers, NmsSorted sorted, NmsLong longs) {
  int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (position >= call.images * call.count) return;
  int64_t first = position / call.count * call.count;
  int64_t rank = first + (sorted.ranks == nullptr ? position - first : sorted.ranks[position]);
  static_cast<typename Geometry::Box*>(buffers.sorted_boxes)[position] =
      Geometry::load(call.boxes, call.box_dtype, first + sorted.order[rank]);
  buffers.gone[rank] = sorted.keys[rank] == std::numeric_limits<int64_t>::max();
  if (!segment_begins(call, sorted.classes, position)) return;
  int64_t end = segment_end(call, sorted.classes, position);
  if (end - position <= kNmsOneBlock) return;
  unsigned slot = atomicAdd(longs.words, 1u);
  longs.begins[slot] = position;
  longs.ends[slot] = end;
}

// All segments in one cooperative launch: short ones by a block each, then long ones by teams of blocks.
template <typename Geometry>
__global__ void __launch_bounds__(kNmsThreads, 1)
    nms_segments_kernel(NmsCall call, NmsBuffers buffers, NmsSorted sorted, NmsLong longs, Geometry geometry) {
  PYDL_SHARED(unsigned, begins, kNmsTile / kWarp);
  int64_t positions = call.images * call.count;
  auto segment = [&](int64_t begin, int64_t end) {
    const int64_t* ranks = sorted.ranks;
    uint8_t* gone = buffers.gone + (ranks == nullptr ? 0 : begin / call.count * call.count);
    return NmsSegment<Geometry>{
        static_cast<const typename Geometry::Box*>(buffers.sorted_boxes), nullptr, gone, ranks, begin, end, call.most};
  };
  int j = int(threadIdx.x);
  for (int64_t tile = int64_t(blockIdx.x) * kNmsTile; tile < positions; tile += int64_t(gridDim.x) * kNmsTile) {
    if (j < kNmsTile) {
      bool here = tile + j < positions && segment_begins(call, sorted.classes, tile + j);
      unsigned bits = __ballot_sync(kFullMask, here);
      if (j % kWarp == 0) begins[j / kWarp] = bits;
    }
    __syncthreads();
    for (int word = 0; word < kNmsTile / kWarp; ++word) {
      for (unsigned bits = begins[word]; bits != 0; bits &= bits - 1) {
        int64_t begin = tile + word * kWarp + __ffs(int(bits)) - 1, end = segment_end(call, sorted.classes, begin);
        if (end - begin > kNmsOneBlock) continue;
        settle_segment(geometry, segment(begin, end), NmsTeam{0, 1, nullptr});
        __syncthreads();
      }
    }
    __syncthreads();
  }
  int waiting = int(*longs.words), blocks = int(gridDim.x);
  int size = waiting < blocks ? blocks / (waiting < 1 ? 1 : waiting) : 1, teams = blocks / size;
  int team = int(blockIdx.x) / size;
  if (team >= teams) return;
  for (int i = team; i < waiting; i += teams) {
    settle_segment(geometry, segment(longs.begins[i], longs.ends[i]),
                   NmsTeam{int(blockIdx.x) % size, size, longs.words + 1 + team});
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kNmsThreads, 1) nms_write_kernel(NmsCall call, NmsBuffers buffers, NmsSorted sorted) {
  int64_t image = blockIdx.x, first = image * call.count;
  write_kept(
      buffers.gone + first, call.count, call.most, [&](int64_t rank) { return sorted.order[first + rank]; },
      buffers.indices + image * call.most, buffers.counts + image);
}

}  // namespace
}  // namespace pydl
