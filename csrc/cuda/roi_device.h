// What the CUDA kernels of RoI pooling share: boxes on the device, and the search for those that reach a tile of dx.
#pragma once

#include "common/cuda_host.h"
#include "common/device_vec.h"
#include "common/indexing.h"
#include "common/roi_host.h"
#include "common/warp.h"

namespace pydl {
namespace {

using cuda_host::DeviceGuard;

constexpr int kRoiThreads = 256;
constexpr int kRoiWarps = kRoiThreads / kWarp;

// A [K, 5] tensor of float32 or float64.
struct RoiRows {
  const void* data;
  bool wide;
};

__device__ inline RoiBox box_at(const RoiRows& rows, int64_t k) {
  return rows.wide ? roi_box(static_cast<const double*>(rows.data), k)
                   : roi_box(static_cast<const float*>(rows.data), k);
}

__host__ __device__ inline int64_t roi_chunks(const RoiShape& s) { return ceil_div(s.rois, int64_t(kRoiThreads)); }

// Which image a box is on, -1 if there is none, and the pixels [low, high) that it may read.
struct RoiBounds {
  int image, row_low, row_high, col_low, col_high;
};

// The bounds of all boxes, and the least and largest image of every kRoiThreads of them: boxes mostly come sorted by
// image, so that one look at these passes over most others.
struct RoiIndex {
  const RoiBounds* bounds;
  const int* images;  // [chunks][2]
};

// One block for each chunk.
template <typename Rule>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_bounds_kernel(RoiRows rows, RoiShape s, RoiBounds* __restrict__ bounds, int* __restrict__ images) {
  PYDL_SHARED(int, least, kRoiWarps);
  PYDL_SHARED(int, largest, kRoiWarps);
  const int64_t k = int64_t(blockIdx.x) * kRoiThreads + threadIdx.x;
  int low = INT32_MAX, high = -1;
  if (k < s.rois) {
    const RoiBox box = box_at(rows, k);
    const RoiRange row = roi_pixels_under(Rule::rows(s, box, rows.wide));
    const RoiRange col = roi_pixels_under(Rule::columns(s, box, rows.wide));
    low = high = int(roi_image(s, box));
    bounds[k] = {low, int(row.low), int(row.high), int(col.low), int(col.high)};
  }
  low = warp_reduce(low, [](int a, int b) { return min(a, b); });
  high = warp_reduce(high, [](int a, int b) { return max(a, b); });
  if (lane_in_warp() == 0) {
    least[threadIdx.x / kWarp] = low;
    largest[threadIdx.x / kWarp] = high;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kRoiWarps; ++w) {
    low = min(low, least[w]);
    high = max(high, largest[w]);
  }
  images[2 * blockIdx.x] = low;
  images[2 * blockIdx.x + 1] = high;
}

// Distances in elements between channels and pixels of x and y.
struct RoiSteps {
  int64_t x_channel, y_channel;
  int x_pixel, y_pixel;
};

// How a block's threads are laid over the bins of a box and over channels.
struct RoiBinTile {
  int rows, cols;             // of bins
  int tiles_h, tiles_w;       // of a box
  int lanes, channel_blocks;  // channels: lanes * V in a block
  int64_t channels;           // of y
};

constexpr int kRoiSlots = 34;  // rows and columns of bins of a tile

// Rows and columns [low, high) of an image.
struct RoiTile {
  int image, row_low, row_high, col_low, col_high;
};

// Shared memory of find_hits.
struct RoiHits {
  int* number;  // [kRoiThreads] numbers within the chunk, ascending
  int* counts;  // [kRoiWarps]
};

// Which boxes of a chunk reach the tile, in their order; returns how many. All threads of the block call it.
__device__ inline int find_hits(const RoiIndex& index, int64_t rois, int64_t chunk, const RoiTile& tile,
                                const RoiHits& hits) {
  if (index.images[2 * chunk] > tile.image || index.images[2 * chunk + 1] < tile.image) return 0;
  const int64_t k = chunk * kRoiThreads + threadIdx.x;
  bool hit = false;
  if (k < rois) {
    const RoiBounds b = index.bounds[k];
    hit = b.image == tile.image && b.row_low < tile.row_high && tile.row_low < b.row_high &&
          b.col_low < tile.col_high && tile.col_low < b.col_high;
  }
  const unsigned votes = __ballot_sync(kFullMask, hit);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  if (lane == 0) hits.counts[warp] = __popc(votes);
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < kRoiWarps; ++w) {
    before += w < warp ? hits.counts[w] : 0;
    total += hits.counts[w];
  }
  if (hit) hits.number[before + __popc(votes & ((1u << lane) - 1))] = int(threadIdx.x);
  __syncthreads();
  return total;
}

// ---- host

inline unsigned roi_grid(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxGridX, op, ": too many elements, ", blocks, " blocks");
  return unsigned(blocks);
}

// Coordinates are 32-bit in the kernels.
inline void check_roi_coordinates(const char* op, const RoiShape& s) {
  constexpr int64_t kLimit = int64_t(1) << 30;
  STD_TORCH_CHECK(s.batch < kLimit && s.channels < kLimit && s.height < kLimit && s.width < kLimit, op,
                  ": the sizes of x must be below 2^30, got ", s.batch, " x ", s.channels, " x ", s.height, " x ",
                  s.width);
  STD_TORCH_CHECK(s.out_h < kLimit && s.out_w < kLimit, op, ": output_size must be below 2^30, got ", s.out_h, " x ",
                  s.out_w);
}

// Boxes as the kernels read them; `kept` holds what they point to.
struct RoiInput {
  Tensor kept;
  RoiRows rows;

  explicit RoiInput(const Tensor& boxes) : kept(host::as_contiguous(boxes)) {
    const Array meta(kept);
    rows = {meta.data, meta.dtype == Dtype::kDouble};
  }
};

// The index over the boxes, in memory of its own.
template <typename Rule>
class RoiIndexed {
 public:
  RoiIndexed(const DeviceGuard& guard, const char* op, const RoiShape& s, const RoiRows& rows)
      : memory_(allocate(guard, s)) {
    int* images = static_cast<int*>(memory_.data);
    RoiBounds* bounds = reinterpret_cast<RoiBounds*>(images + 2 * roi_chunks(s));
    index = {bounds, images};
    if (s.rois == 0) return;
    PYDL_LAUNCH(roi_bounds_kernel<Rule>, roi_grid(op, roi_chunks(s)), kRoiThreads, 0, guard.stream(), rows, s, bounds,
                images);
  }

  RoiIndex index;

 private:
  static Output allocate(const DeviceGuard& guard, const RoiShape& s) {
    const int64_t sizes[1] = {2 * roi_chunks(s) + s.rois * int64_t(sizeof(RoiBounds) / sizeof(int))}, strides[1] = {1};
    return guard.empty_strided(sizes, strides, 1, Dtype::kInt32);
  }

  Output memory_;
};

inline Output empty_roi(const DeviceGuard& guard, const RoiStrides& t, Dtype dtype) {
  return guard.empty_strided(t.sizes, t.strides, 4, dtype);
}

// The largest power of two that is at most `most` and wastes the fewest lanes of blocks over `items`.
inline int roi_lanes(int64_t items, int most) {
  int best = 1;
  for (int lanes = 1; lanes <= most; lanes *= 2) {
    if (ceil_div(items, int64_t(lanes)) * lanes <= ceil_div(items, int64_t(best)) * best) best = lanes;
  }
  return best;
}

inline RoiSteps roi_steps(const RoiShape& s, int64_t y_channels) {
  if (s.channels_last) return {1, 1, int(s.channels), int(y_channels)};
  return {s.height * s.width, s.out_h * s.out_w, 1, 1};
}

// Tiles for V channels of y in a thread: neighbouring ones if `packed`, else `lanes` apart.
inline RoiBinTile roi_bin_tile(const RoiShape& s, int64_t channels, bool packed, int v) {
  const int64_t groups = ceil_div(channels, int64_t(v));
  RoiBinTile g{};
  g.channels = channels;
  int most = 64;  // bins
  if (packed) {
    g.lanes = roi_lanes(groups, kWarp);
    most = std::min(most, kRoiThreads / g.lanes);
  }
  g.cols = int(std::min<int64_t>(s.out_w, std::min(most, kWarp)));
  g.rows = int(std::min<int64_t>(s.out_h, std::min(most / g.cols, kRoiSlots - g.cols)));
  if (!packed) g.lanes = int(std::min<int64_t>(kRoiThreads / (g.rows * g.cols), groups));
  g.tiles_h = int(ceil_div(s.out_h, int64_t(g.rows)));
  g.tiles_w = int(ceil_div(s.out_w, int64_t(g.cols)));
  g.channel_blocks = int(ceil_div(channels, int64_t(g.lanes) * v));
  return g;
}

inline int64_t roi_tiles(const RoiShape& s, const RoiBinTile& g) {
  return s.rois * g.tiles_h * g.tiles_w * g.channel_blocks;
}

}  // namespace
}  // namespace pydl
