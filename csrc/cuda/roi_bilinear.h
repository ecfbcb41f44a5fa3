// Bilinear RoI pooling, forward: a block owns a tile of bins of one box and some channels. Few of its threads merge the
// samples of a row or column of bins into weighted pixels, in shared memory; then all sum weight times pixel.
#pragma once

#include "cuda/roi_device.h"

namespace pydl {
namespace {

// How threads are laid over bins and channels.
//   kPacked: channels-last layout, a thread holds V neighbouring channels, neighbours in a warp hold the next ones
//   kPlanes: any layout, neighbours hold the next bin, a thread holds V channels
//   kSplit:  the same, and each bin reads channels of its own: channel c of bin b is channel c * bins + b of x
enum class RoiMap { kPacked, kPlanes, kSplit };

constexpr int kRoiSamples = 8;  // samples of a bin and axis in the table at once; each reads two pixels
constexpr int kRoiReads = 2 * kRoiSamples;

template <typename A>
struct RoiRead {
  A weight;
  int pixel;
};

template <typename A>
struct RoiTable {
  RoiRead<A>* reads;  // [kRoiSlots][kRoiReads]
  int* counts;        // [kRoiSlots]
};

// Puts the next samples of a slot's bin into the table; false if there are no more.
template <typename A>
__device__ bool fill_slot(const RoiTable<A>& table, int slot, const RoiAxis& axis, int64_t bin, RoiSamples& rest) {
  RoiSamples now = rest;
  if (now.count > kRoiSamples) now.count = kRoiSamples;
  rest.first += double(now.count);
  rest.count -= now.count;
  int count = 0;
  roi_taps(axis, bin, now,
           [&](int64_t pixel, double weight) { table.reads[slot * kRoiReads + count++] = {A(weight), int(pixel)}; });
  table.counts[slot] = count;
  return rest.count > 0;
}

// Adds the pixels of a bin, rows by columns of the table, to sums. x points at the thread's first channel.
template <RoiMap MAP, int V, typename T, typename A>
__device__ __forceinline__ void add_reads(const RoiTable<A>& table, int row_slot, int col_slot, const T* x, int width,
                                          const RoiSteps& steps, int64_t channel_step, int channels, A (&sums)[V]) {
  for (int i = 0; i < table.counts[row_slot]; ++i) {
    const RoiRead<A> row = table.reads[row_slot * kRoiReads + i];
    const T* pixels = x + int64_t(row.pixel) * width * steps.x_pixel;
    for (int j = 0; j < table.counts[col_slot]; ++j) {
      const RoiRead<A> col = table.reads[col_slot * kRoiReads + j];
      const A weight = row.weight * col.weight;
      const T* from = pixels + int64_t(col.pixel) * steps.x_pixel;
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

// undefined_when_empty: a bin without samples is 0 / 0, not 0.
template <typename T, RoiMap MAP, int V>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_bilinear_kernel(const T* __restrict__ x, RoiRows boxes, T* __restrict__ y, RoiShape s, RoiBinTile g,
                        RoiSteps steps, bool undefined_when_empty) {
  using A = acc_t<T>;
  PYDL_SHARED(RoiRead<A>, reads, kRoiSlots * kRoiReads);
  PYDL_SHARED(int, counts, kRoiSlots);
  const RoiTable<A> table{reads, counts};
  uint64_t block = blockIdx.x;
  const int first_channel = take_digit(block, g.channel_blocks) * g.lanes * V;
  const int first_col = take_digit(block, g.tiles_w) * g.cols, first_row = take_digit(block, g.tiles_h) * g.rows;
  const int64_t k = int64_t(block);
  const RoiBox box = box_at(boxes, k);
  const int64_t image = roi_image(s, box);
  const int thread = int(threadIdx.x), rows = min(g.rows, int(s.out_h) - first_row);
  const int cols = min(g.cols, int(s.out_w) - first_col);

  const bool is_row = thread < rows, is_col = !is_row && thread < rows + cols;
  const int64_t own_bin = is_row ? first_row + thread : first_col + thread - rows;
  RoiAxis own = {};
  RoiSamples all = {};
  if (is_row || is_col) {
    own = is_row ? roi_rows(s, box) : roi_columns(s, box);
    all = roi_samples(own, own_bin, -1, double(own.length));
  }
  const bool undefined = undefined_when_empty && __syncthreads_or((is_row || is_col) && roi_undefined(own));

  const int bins = g.rows * g.cols;
  const int bin = MAP == RoiMap::kPacked ? thread / g.lanes : thread % bins;
  const int lane = MAP == RoiMap::kPacked ? thread % g.lanes : thread / bins;
  const int bin_row = bin / g.cols, bin_col = bin % g.cols;
  // a thread's channels: c, and so many more at a distance of `spacing`
  const int spacing = MAP == RoiMap::kPacked ? 1 : g.lanes;
  const int64_t c = first_channel + (MAP == RoiMap::kPacked ? lane * V : lane);
  const int64_t left = c < g.channels ? ceil_div(g.channels - c, int64_t(spacing)) : 0;
  const int channels = left < V ? int(left) : V;
  const bool works = lane < g.lanes && bin_row < rows && bin_col < cols && channels > 0;
  const int64_t out_bin = int64_t(first_row + bin_row) * s.out_w + first_col + bin_col;
  const int64_t split = MAP == RoiMap::kSplit ? s.out_h * s.out_w : 1;

  A sums[V];
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] = image < 0 || undefined ? A(NAN) : A(0);
  if (image >= 0) {
    const int64_t in_channel = c * split + (MAP == RoiMap::kSplit ? out_bin : 0);
    const T* from = x + image * s.channels * s.height * s.width + in_channel * steps.x_channel;
    RoiSamples row_rest = all;
    bool more_rows = true;
    while (more_rows) {
      bool row_left = is_row && fill_slot(table, thread, own, own_bin, row_rest);
      RoiSamples col_rest = all;
      bool more_cols = true;
      while (more_cols) {
        const bool col_left = is_col && fill_slot(table, thread, own, own_bin, col_rest);
        more_cols = __syncthreads_or(col_left) != 0;
        if (works) {
          add_reads<MAP, V>(table, bin_row, rows + bin_col, from, int(s.width), steps,
                            spacing * split * steps.x_channel, channels, sums);
        }
        if (more_cols) __syncthreads();
      }
      more_rows = __syncthreads_or(row_left) != 0;
    }
  }
  if (!works) return;
  T* to = y + k * g.channels * s.out_h * s.out_w + c * steps.y_channel + out_bin * steps.y_pixel;
  if constexpr (MAP == RoiMap::kPacked) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.at[v] = from_acc<T>(sums[v]);
    store_pack(to, pack);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v < channels) to[v * spacing * steps.y_channel] = from_acc<T>(sums[v]);
    }
  }
}

// ---- launcher

struct RoiForward {
  const char* op;
  RoiShape shape;
  RoiRows boxes;
  const void* x;
  void* y;
  int64_t channels;  // of y
  bool undefined_when_empty;
  cudaStream_t stream;
};

template <typename T, RoiMap MAP, int V>
void launch_roi_bilinear(const RoiForward& f) {
  const RoiShape& s = f.shape;
  const RoiBinTile g = roi_bin_tile(s, f.channels, MAP == RoiMap::kPacked, V);
  PYDL_LAUNCH((roi_bilinear_kernel<T, MAP, V>), roi_grid(f.op, roi_tiles(s, g)), kRoiThreads, 0, f.stream,
              static_cast<const T*>(f.x), f.boxes, static_cast<T*>(f.y), s, g, roi_steps(s, f.channels),
              f.undefined_when_empty);
}

}  // namespace
}  // namespace pydl
