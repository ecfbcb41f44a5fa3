// Greedy suppression of boxes that are sorted by score, for any kind of box.
//
// A segment (the boxes of one image and class) is walked in chunks of up to 256 boxes that nothing has suppressed yet.
// A chunk is settled in shared memory: one bit for each pair, then rounds in which a box is decided as soon as all
// boxes before it that could suppress it are. Only the kept boxes of the chunk are then tested against the boxes behind
// it. Work is N times the number of kept boxes, memory one byte per box. Several blocks may share a segment: each
// settles every chunk, with the same result, and tests its part of the rest; one barrier per chunk.
//
// A Geometry says what boxes are: its Box can be copied, and suppresses(kept, later) is the rule, of which kUnroll are
// worth having in flight.
#pragma once

#include "common/atomics.h"
#include "common/device.h"
#include "common/shared.h"
#include "common/warp.h"

namespace pydl {
namespace {

constexpr int kNmsThreads = 512;
constexpr int kNmsWarps = kNmsThreads / kWarp;
constexpr int kNmsChunk = 256;
constexpr int kNmsWords = kNmsChunk / kWarp;

// Positions of a segment, in order of decreasing score.
template <typename Geometry>
struct NmsSegment {
  const typename Geometry::Box* boxes;  // by position, as the next one
  const int64_t* classes;               // null: all boxes are of one class
  uint8_t* gone;                        // 1: not to be kept; by rank
  const int64_t* rank;                  // of a position; null: its position
  int64_t begin, end;
  int64_t most;  // the walk may end when so many are kept

  __device__ uint8_t& gone_at(int64_t position) const { return gone[rank == nullptr ? position : rank[position]]; }
};

// The blocks that share a segment.
struct NmsTeam {
  int rank, blocks;
  unsigned* barrier;

  __device__ void wait() const {
    if (blocks > 1) {
      blocks_barrier(barrier, unsigned(blocks));
    } else {
      __syncthreads();
    }
  }
};

// Sum over the threads before this one, and over all. All threads call it; `counts` is shared, one per warp.
__device__ inline int count_before(int count, int* counts, int& total) {
  int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, before = count;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    int left = __shfl_up_sync(kFullMask, before, step);
    before += lane >= step ? left : 0;
  }
  if (lane == kWarp - 1) counts[warp] = before;
  __syncthreads();
  total = 0;
  before -= count;
  for (int w = 0; w < kNmsWarps; ++w) {
    before += w < warp ? counts[w] : 0;
    total += counts[w];
  }
  __syncthreads();
  return before;
}

// Writes the next positions that nothing has suppressed, as distances from the segment's begin; returns how many.
template <typename Geometry>
__device__ int collect_chunk(const NmsSegment<Geometry>& s, int64_t& next, int* positions) {
  PYDL_SHARED(int, counts, kNmsWarps);
  PYDL_SHARED(int, last, 1);
  int found = 0;
  while (next < s.end && found < kNmsChunk) {
    int64_t position = next + threadIdx.x;
    bool open = position < s.end && s.gone_at(position) == 0;
    int total;
    int slot = found + count_before(open ? 1 : 0, counts, total);
    if (open && slot < kNmsChunk) positions[slot] = int(position - s.begin);
    if (open && slot == kNmsChunk - 1) *last = int(position - s.begin);
    __syncthreads();
    bool full = found + total >= kNmsChunk;
    next = full ? s.begin + *last + 1 : next + kNmsThreads;
    found = full ? kNmsChunk : found + total;
  }
  next = next < s.end ? next : s.end;
  return found;
}

// Bit i of rows[w * kNmsChunk + j]: box 32 w + i of the chunk, which comes before j, would suppress box j.
template <typename Geometry>
__device__ void compare_chunk(const Geometry& geometry, const typename Geometry::Box* boxes, const int64_t* classes,
                              int count, unsigned* rows) {
  int j = int(threadIdx.x) % kNmsChunk, part = int(threadIdx.x) / kNmsChunk;
  if (j >= count) return;
  typename Geometry::Box own = boxes[j];
  for (int w = part; w <= j / kWarp; w += kNmsThreads / kNmsChunk) {
    unsigned word = 0;
#pragma unroll Geometry::kUnroll
    for (int i = 0; i < kWarp; ++i) {
      int other = w * kWarp + i;
      bool comes_before = other < j && (classes == nullptr || classes[other] == classes[j]);
      if (comes_before && geometry.suppresses(boxes[other], own)) word |= 1u << i;
    }
    rows[w * kNmsChunk + j] = word;
  }
}

// Decides the chunk; whether the thread's box (the first kNmsChunk threads have one) is kept. A box is kept when all
// before it that would suppress it are gone.
__device__ inline bool settle_chunk(const unsigned* rows, int count) {
  PYDL_SHARED(unsigned, open, kNmsWords);
  PYDL_SHARED(unsigned, kept, kNmsWords);
  int j = int(threadIdx.x), warp = j / kWarp;
  bool undecided = j < count, is_kept = false;
  unsigned row[kNmsWords];
#pragma unroll
  for (int w = 0; w < kNmsWords; ++w) row[w] = undecided && w <= warp ? rows[w * kNmsChunk + j] : 0;
  int more = 1;
  while (more) {
    if (j < kNmsChunk) {
      unsigned open_bits = __ballot_sync(kFullMask, undecided), kept_bits = __ballot_sync(kFullMask, is_kept);
      if (j % kWarp == 0) {
        open[warp] = open_bits;
        kept[warp] = kept_bits;
      }
    }
    __syncthreads();
    if (undecided) {
      unsigned by_kept = 0, by_open = 0;
#pragma unroll
      for (int w = 0; w < kNmsWords; ++w) {
        by_kept |= row[w] & kept[w];
        by_open |= row[w] & open[w];
      }
      is_kept = by_kept == 0 && by_open == 0;
      undecided = by_kept == 0 && by_open != 0;
    }
    more = __syncthreads_or(undecided);
  }
  return is_kept;
}

// Tests positions from `next` on against `keeps` kept boxes. Where few positions are left, several threads share one
// and its kept boxes.
template <typename Geometry>
__device__ void sweep_rest(const Geometry& geometry, const NmsSegment<Geometry>& s, const NmsTeam& team, int64_t next,
                           const typename Geometry::Box* kept, const int64_t* classes, int keeps) {
  int shares = 1;
  while (shares < kNmsWarps && (s.end - next) * shares * 2 <= int64_t(team.blocks) * kNmsThreads) shares *= 2;
  int width = kNmsThreads / shares, share = int(threadIdx.x) / width;
  for (int64_t position = next + int64_t(team.rank) * width + threadIdx.x % width; position < s.end;
       position += int64_t(team.blocks) * width) {
    if (s.gone_at(position) != 0) continue;
    typename Geometry::Box own = s.boxes[position];
    int64_t own_class = s.classes == nullptr ? 0 : s.classes[position];
    for (int k = share; k < keeps; k += shares) {
      if ((s.classes == nullptr || classes[k] == own_class) && geometry.suppresses(kept[k], own)) {
        s.gone_at(position) = 1;
        break;
      }
    }
  }
}

// Marks the boxes of a segment that are not kept. Boxes marked before take no part.
template <typename Geometry>
__device__ void settle_segment(const Geometry& geometry, const NmsSegment<Geometry>& s, const NmsTeam& team) {
  using Box = typename Geometry::Box;
  PYDL_SHARED(Box, boxes, kNmsChunk);
  PYDL_SHARED(int64_t, classes, kNmsChunk);
  PYDL_SHARED(unsigned, rows, kNmsChunk* kNmsWords);
  PYDL_SHARED(int, positions, kNmsChunk);
  PYDL_SHARED(int, counts, kNmsWarps);
  int j = int(threadIdx.x);
  int64_t next = s.begin, kept_so_far = 0;
  while (true) {
    int count = collect_chunk(s, next, positions);
    if (count == 0) return;
    int64_t position = s.begin + (j < count ? positions[j] : 0);
    if (j < count) {
      boxes[j] = s.boxes[position];
      if (s.classes != nullptr) classes[j] = s.classes[position];
    }
    __syncthreads();
    compare_chunk(geometry, boxes, s.classes == nullptr ? nullptr : classes, count, rows);
    __syncthreads();
    bool is_kept = settle_chunk(rows, count);
    int keeps;
    int slot = count_before(is_kept ? 1 : 0, counts, keeps);
    if (is_kept) {  // read once more, rather than kept in registers all the while
      boxes[slot] = s.boxes[position];
      if (s.classes != nullptr) classes[slot] = s.classes[position];
    }
    __syncthreads();
    kept_so_far += keeps;
    bool done = next >= s.end || kept_so_far >= s.most;
    if (!done) sweep_rest(geometry, s, team, next, boxes, classes, keeps);
    team.wait();
    // only now has every block of the team read which boxes of this chunk were open
    if (team.rank == 0 && j < count && !is_kept) s.gone_at(position) = 1;
    if (done) return;
  }
}

// Writes source(rank) for the first `most` ranks below `valid` that are not gone, fills up with -1, and counts them.
template <typename Source>
__device__ void write_kept(const uint8_t* gone, int64_t valid, int64_t most, Source source, int64_t* out,
                           int64_t* count) {
  constexpr int kEach = 8;
  PYDL_SHARED(int, counts, kNmsWarps);
  int64_t written = 0;
  for (int64_t start = 0; start < valid && written < most; start += kEach * kNmsThreads) {
    int64_t rank = start + int64_t(threadIdx.x) * kEach;
    unsigned kept = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (rank + i < valid && gone[rank + i] == 0) kept |= 1u << i;
    }
    int total;
    int64_t slot = written + count_before(__popc(kept), counts, total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if ((kept >> i & 1u) == 0) continue;
      if (slot < most) out[slot] = source(rank + i);
      ++slot;
    }
    written += total;
  }
  written = written < most ? written : most;
  for (int64_t i = written + threadIdx.x; i < most; i += kNmsThreads) out[i] = -1;
  if (threadIdx.x == 0) *count = written;
}

}  // namespace
}  // namespace pydl
