// Bilinear RoI pooling, backward, without atomics: a block owns a tile of pixels of dx and some channels. It looks for
// the boxes that reach the tile and adds them in their order, several at a time: first the weights of its rows and
// columns of pixels in the bins over them, in shared memory, then weight times dy.
#pragma once

#include "cuda/roi_bilinear.h"

namespace pydl {
namespace {

// The rule of bilinear pooling: the axes of a box.
struct RoiBilinear {
  __device__ static RoiAxis rows(const RoiShape& s, const RoiBox& box, bool) { return roi_rows(s, box); }
  __device__ static RoiAxis columns(const RoiShape& s, const RoiBox& box, bool) { return roi_columns(s, box); }
};

struct RoiPixelTile {
  int row_bits, col_bits;     // a tile is 2^row_bits x 2^col_bits pixels
  int tiles_h, tiles_w;       // of an image
  int lanes, channel_blocks;  // channels: lanes * V in a block
};

constexpr int kRoiBatch = 4;    // boxes at a time
constexpr int kRoiBins = 16;    // bins along an axis whose weights are in the table at once
constexpr int kRoiFillers = 4;  // threads that fill the weights of one pixel

// For each box of a batch and each of `slots` rows, then columns, of the tile: the bins over it, counted from the first
// one in the table, and their weights.
template <typename A>
struct RoiOver {
  A* weights;   // [kRoiBatch][slots][kRoiBins]
  int* ranges;  // [kRoiBatch][slots][2]
  int rows, slots;
};

struct RoiSlot {
  int low, high;
};
template <typename A>
__device__ __forceinline__ RoiSlot slot_range(const RoiOver<A>& over, int slot) {
  return {over.ranges[2 * slot], over.ranges[2 * slot + 1]};
}

struct RoiBatch {
  const int* numbers;  // of the boxes, from `first`
  int64_t first;
  int count;
  int bin_row, bin_col;  // the first bins in the table
};

template <typename A>
__device__ void fill_over(const RoiOver<A>& over, const RoiBatch& batch, const RoiRows& boxes, const RoiShape& s,
                          const RoiTile& tile) {
  for (int item = int(threadIdx.x); item < batch.count * over.slots * kRoiFillers; item += kRoiThreads) {
    const int filler = item % kRoiFillers, at = item / kRoiFillers, slot = at % over.slots, b = at / over.slots;
    const RoiBox box = box_at(boxes, batch.first + batch.numbers[b]);
    const bool is_row = slot < over.rows;
    const RoiAxis axis = is_row ? roi_rows(s, box) : roi_columns(s, box);
    const int pixel = is_row ? tile.row_low + slot : tile.col_low + slot - over.rows;
    const int64_t start = is_row ? batch.bin_row : batch.bin_col;
    RoiRange bins = pixel < axis.length ? roi_bins_over(axis, pixel) : RoiRange{0, 0};
    if (bins.low < start) bins.low = start;
    if (bins.high > start + kRoiBins) bins.high = start + kRoiBins;
    if (filler == 0) {
      over.ranges[2 * at] = int(bins.low - start);
      over.ranges[2 * at + 1] = int(bins.high - start);
    }
    for (int64_t bin = bins.low + filler; bin < bins.high; bin += kRoiFillers) {
      over.weights[at * kRoiBins + int(bin - start)] = A(roi_weight(axis, bin, pixel));
    }
  }
}

// Adds the bins over one pixel to V channels. dy points at the thread's first channel of the box's first bin.
template <RoiMap MAP, int V, typename T, typename A>
__device__ __forceinline__ void add_over(const RoiOver<A>& over, int row_slot, int col_slot, const T* dy, int out_w,
                                         const RoiSteps& steps, int64_t channel_step, int channels, A (&sums)[V]) {
  const RoiSlot rows = slot_range(over, row_slot), cols = slot_range(over, col_slot);
  for (int i = rows.low; i < rows.high; ++i) {
    const A row_weight = over.weights[row_slot * kRoiBins + i];
    if (row_weight == A(0)) continue;  // 0 times an infinity is no 0
    for (int j = cols.low; j < cols.high; ++j) {
      const A col_weight = over.weights[col_slot * kRoiBins + j], weight = row_weight * col_weight;
      if (col_weight == A(0)) continue;
      const T* from = dy + (int64_t(i) * out_w + j) * steps.y_pixel;
      if constexpr (MAP == RoiMap::kPacked) {
        const Pack<T, V> pack = load_pack<V>(from);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v] += weight * to_acc(pack.at[v]);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (v < channels) sums[v] += weight * to_acc(from[v * channel_step]);
        }
      }
    }
  }
}

// kSplit: the bin that each channel of a thread belongs to, and its place in the dy of a box.
template <int V>
struct RoiOwnBins {
  int rows[V], cols[V];
  int64_t places[V];
};

// The same where each channel of x belongs to one bin.
template <int V, typename T, typename A>
__device__ __forceinline__ void add_own(const RoiOver<A>& over, const RoiBatch& batch, int row_slot, int col_slot,
                                        const T* dy, const RoiOwnBins<V>& own, int channels, A (&sums)[V]) {
  const RoiSlot rows = slot_range(over, row_slot), cols = slot_range(over, col_slot);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = own.rows[v] - batch.bin_row, j = own.cols[v] - batch.bin_col;
    if (v >= channels || i < rows.low || i >= rows.high || j < cols.low || j >= cols.high) continue;
    const A row_weight = over.weights[row_slot * kRoiBins + i], col_weight = over.weights[col_slot * kRoiBins + j];
    if (row_weight != A(0) && col_weight != A(0)) sums[v] += row_weight * col_weight * to_acc(dy[own.places[v]]);
  }
}

template <typename T, RoiMap MAP, int V, int P>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_bilinear_bwd_kernel(const T* __restrict__ dy, RoiRows boxes, RoiIndex index, T* __restrict__ dx, RoiShape s,
                            RoiPixelTile g, RoiSteps steps, int64_t y_channels) {
  using A = acc_t<T>;
  PYDL_DYN_SHARED(A, shared);
  const int tile_rows = 1 << g.row_bits, tile_cols = 1 << g.col_bits, slots = tile_rows + tile_cols;
  const RoiOver<A> over{shared, reinterpret_cast<int*>(shared + kRoiBatch * slots * kRoiBins), tile_rows, slots};
  const RoiHits hits{over.ranges + kRoiBatch * slots * 2, over.ranges + kRoiBatch * slots * 2 + kRoiThreads};
  uint64_t block = blockIdx.x;
  const int first_channel = take_digit(block, g.channel_blocks) * g.lanes * V;
  const int col = take_digit(block, g.tiles_w) << g.col_bits, row = take_digit(block, g.tiles_h) << g.row_bits;
  const RoiTile tile{int(block), row, min(row + tile_rows, int(s.height)), col, min(col + tile_cols, int(s.width))};

  const int thread = int(threadIdx.x), pass = kRoiThreads / g.lanes;  // a thread's pixels are `pass` apart in the tile
  const int lane = MAP == RoiMap::kPacked ? thread % g.lanes : thread / pass;
  const int pixel = MAP == RoiMap::kPacked ? thread / g.lanes : thread % pass;
  const int spacing = MAP == RoiMap::kPacked ? 1 : g.lanes;
  const int64_t c = first_channel + (MAP == RoiMap::kPacked ? lane * V : lane);
  const int64_t left = c < s.channels ? ceil_div(s.channels - c, int64_t(spacing)) : 0;
  const int channels = left < V ? int(left) : V;
  const int64_t bins = s.out_h * s.out_w;
  RoiOwnBins<V> own = {};
  if constexpr (MAP == RoiMap::kSplit) {
    for (int v = 0; v < V; ++v) {
      const int64_t channel = c + v * spacing, bin = channel % bins;
      own.rows[v] = int(bin / s.out_w);
      own.cols[v] = int(bin % s.out_w);
      own.places[v] = channel / bins * steps.y_channel + bin * steps.y_pixel;
    }
  }

  A sums[P][V] = {};
  for (int64_t chunk = 0; chunk < roi_chunks(s); ++chunk) {
    const int found = find_hits(index, s.rois, chunk, tile, hits);
    for (int done = 0; done < found; done += kRoiBatch) {
      RoiBatch batch{hits.number + done, chunk * kRoiThreads, min(kRoiBatch, found - done), 0, 0};
      for (batch.bin_row = 0; batch.bin_row < s.out_h; batch.bin_row += kRoiBins) {
        for (batch.bin_col = 0; batch.bin_col < s.out_w; batch.bin_col += kRoiBins) {
          fill_over(over, batch, boxes, s, tile);
          __syncthreads();
          for (int b = 0; b < batch.count && channels > 0; ++b) {
            const T* from = dy + (batch.first + batch.numbers[b]) * y_channels * bins;
            const int64_t first_bin = int64_t(batch.bin_row) * s.out_w + batch.bin_col;
#pragma unroll
            for (int p = 0; p < P; ++p) {
              const int at = pixel + p * pass, base = b * slots;
              const int row_slot = base + (at >> g.col_bits), col_slot = base + tile_rows + (at & (tile_cols - 1));
              if constexpr (MAP == RoiMap::kSplit) {
                add_own<V>(over, batch, row_slot, col_slot, from, own, channels, sums[p]);
              } else {
                add_over<MAP, V>(over, row_slot, col_slot, from + first_bin * steps.y_pixel + c * steps.y_channel,
                                 int(s.out_w), steps, spacing * steps.y_channel, channels, sums[p]);
              }
            }
          }
          __syncthreads();
        }
      }
    }
  }
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int at = pixel + p * pass, y = row + (at >> g.col_bits), x = col + (at & (tile_cols - 1));
    if (y >= tile.row_high || x >= tile.col_high) continue;
    T* to = dx + int64_t(tile.image) * s.channels * s.height * s.width + c * steps.x_channel +
            (int64_t(y) * s.width + x) * steps.x_pixel;
    if constexpr (MAP == RoiMap::kPacked) {
      if (channels == 0) continue;
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.at[v] = from_acc<T>(sums[p][v]);
      store_pack(to, pack);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v < channels) to[v * spacing * steps.x_channel] = from_acc<T>(sums[p][v]);
      }
    }
  }
}

// ---- launcher

struct RoiBackward {
  const char* op;
  RoiShape shape;  // with the channels of x
  RoiRows boxes;
  RoiIndex index;
  const void* dy;
  void* dx;
  int64_t y_channels;
  cudaStream_t stream;
};

template <typename T, RoiMap MAP, int V, int P>
void launch_roi_bilinear_bwd(const RoiBackward& f) {
  const RoiShape& s = f.shape;
  const int64_t groups = ceil_div(s.channels, int64_t(V));
  RoiPixelTile g{};
  g.lanes = MAP == RoiMap::kPacked ? roi_lanes(groups, kWarp) : roi_lanes(groups, 2);
  int bits = 0;
  while (1 << bits < kRoiThreads / g.lanes * P) ++bits;
  g.row_bits = bits / 2;
  g.col_bits = bits - g.row_bits;
  g.tiles_h = int(ceil_div(s.height, int64_t(1) << g.row_bits));
  g.tiles_w = int(ceil_div(s.width, int64_t(1) << g.col_bits));
  g.channel_blocks = int(ceil_div(groups, int64_t(g.lanes)));
  const int64_t slots = (1 << g.row_bits) + (1 << g.col_bits);
  const int64_t shared = kRoiBatch * slots * (kRoiBins * int64_t(sizeof(acc_t<T>)) + 2 * int64_t(sizeof(int))) +
                         (kRoiThreads + kRoiWarps) * int64_t(sizeof(int));
  const int64_t blocks = s.batch * g.tiles_h * g.tiles_w * g.channel_blocks;
  PYDL_LAUNCH((roi_bilinear_bwd_kernel<T, MAP, V, P>), roi_grid(f.op, blocks), kRoiThreads, size_t(shared), f.stream,
              static_cast<const T*>(f.dy), f.boxes, f.index, static_cast<T*>(f.dx), s, g, roi_steps(s, f.y_channels),
              f.y_channels);
}

}  // namespace
}  // namespace pydl
