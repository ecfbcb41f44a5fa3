// RoI max pooling (Girshick, Fast R-CNN, 2015), forward: a block owns a tile of bins of one box and some channels. The
// first maximum of a window in row-major order wins, NaN never does; a window that holds nothing above the lowest
// float32 has that value and no position, an empty one is 0.
#include "common/roi_window.h"
#include "cuda/roi_device.h"

namespace pydl {
namespace {

// PACKED: channels-last layout, a thread holds V neighbouring channels; else V channels `lanes` apart.
template <typename T, bool PACKED, int V>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_pool_kernel(const T* __restrict__ x, RoiRows boxes, T* __restrict__ y, int* __restrict__ argmax, RoiShape s,
                    RoiBinTile g, RoiSteps steps) {
  using A = acc_t<T>;
  PYDL_SHARED(int, windows, kRoiSlots * 2);
  uint64_t block = blockIdx.x;
  const int first_channel = take_digit(block, g.channel_blocks) * g.lanes * V;
  const int first_col = take_digit(block, g.tiles_w) * g.cols, first_row = take_digit(block, g.tiles_h) * g.rows;
  const int64_t k = int64_t(block);
  const RoiBox box = box_at(boxes, k);
  const int64_t image = roi_image(s, box);
  const int thread = int(threadIdx.x), rows = min(g.rows, int(s.out_h) - first_row);
  const int cols = min(g.cols, int(s.out_w) - first_col);
  bool finite = true;
  if (thread < rows + cols) {
    const bool is_row = thread < rows;
    const RoiWindow axis = is_row ? roi_window_rows(s, box, boxes.wide) : roi_window_columns(s, box, boxes.wide);
    const RoiRange own = roi_pixels(axis, is_row ? first_row + thread : first_col + thread - rows);
    windows[2 * thread] = int(own.low);
    windows[2 * thread + 1] = int(own.high);
    finite = axis.finite;
  }
  const bool lost = __syncthreads_or(!finite) || image < 0;

  const int bins = g.rows * g.cols;
  const int bin = PACKED ? thread / g.lanes : thread % bins, lane = PACKED ? thread % g.lanes : thread / bins;
  const int bin_row = bin / g.cols, bin_col = bin % g.cols, spacing = PACKED ? 1 : g.lanes;
  const int64_t c = first_channel + (PACKED ? lane * V : lane);
  if (lane >= g.lanes || bin_row >= rows || bin_col >= cols || c >= s.channels) return;
  const int row_low = windows[2 * bin_row], row_high = windows[2 * bin_row + 1];
  const int col_low = windows[2 * (rows + bin_col)], col_high = windows[2 * (rows + bin_col) + 1];
  const bool empty = row_low >= row_high || col_low >= col_high;

  A best[V];
  int position[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    best[v] = lost ? A(NAN) : empty ? A(0) : A(kRoiLowest);
    position[v] = -1;
  }
  const T* from = x + (lost ? 0 : image) * s.channels * s.height * s.width + c * steps.x_channel;
  for (int row = row_low; row < row_high && !lost; ++row) {
    for (int col = col_low; col < col_high; ++col) {
      const int at = row * int(s.width) + col;
      const T* pixel = from + int64_t(at) * steps.x_pixel;
      Pack<T, V> pack;
      if constexpr (PACKED) {
        pack = load_pack<V>(pixel);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (c + v * spacing < s.channels) pack.at[v] = pixel[v * spacing * steps.x_channel];
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A value = to_acc(pack.at[v]);
        const bool wins = value > best[v];
        best[v] = wins ? value : best[v];
        position[v] = wins ? at : position[v];
      }
    }
  }
  const int64_t out = k * s.channels * s.out_h * s.out_w + c * steps.y_channel +
                      (int64_t(first_row + bin_row) * s.out_w + first_col + bin_col) * steps.y_pixel;
  if constexpr (PACKED) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.at[v] = from_acc<T>(best[v]);
    store_pack(y + out, pack);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (c + v * spacing >= s.channels) break;
    const int64_t to = out + v * spacing * steps.y_channel;
    if (!PACKED) y[to] = from_acc<T>(best[v]);
    if (argmax != nullptr) argmax[to] = position[v];
  }
}

// ---- launcher

struct Forward {
  RoiShape shape;
  RoiRows boxes;
  const void* x;
  void* y;
  int* argmax;  // null: values only
  cudaStream_t stream;
};

template <typename T, bool PACKED, int V>
void launch(const Forward& f) {
  const RoiShape& s = f.shape;
  const RoiBinTile g = roi_bin_tile(s, s.channels, PACKED, V);
  PYDL_LAUNCH((roi_pool_kernel<T, PACKED, V>), roi_grid("roi_pool", roi_tiles(s, g)), kRoiThreads, 0, f.stream,
              static_cast<const T*>(f.x), f.boxes, static_cast<T*>(f.y), f.argmax, s, g, roi_steps(s, s.channels));
}

template <typename T>
void run(const Forward& f) {
  constexpr int N = 16 / int(sizeof(T));
  if (!f.shape.channels_last) return launch<T, false, 4>(f);
  f.shape.channels % N == 0 && is_aligned(f.x, 16) && is_aligned(f.y, 16) ? launch<T, true, N>(f)
                                                                          : launch<T, true, 1>(f);
}

// ---- host functions

struct Pooled {
  Output y;
  std::optional<Output> argmax;
};

Pooled roi_pool(const Tensor& x_in, const Tensor& boxes_in, int64_t out_h, int64_t out_w, double scale,
                bool with_argmax) {
  const char* const op = "roi_pool";
  const RoiShape s = roi_shape(op, Array(x_in), Array(boxes_in), out_h, out_w, scale, 0, false);
  check_roi_positions(op, s.height, s.width);
  check_roi_coordinates(op, s);
  const DeviceGuard guard(x_in);
  guard.check_same(op, "boxes", boxes_in);
  const Tensor x = dense_in(x_in, s.channels_last);
  const RoiInput boxes(boxes_in);
  const Array meta(x);
  const RoiStrides strides = roi_strides(s, s.rois, s.channels, out_h, out_w);
  Pooled out{empty_roi(guard, strides, meta.dtype), std::nullopt};
  if (with_argmax) out.argmax = empty_roi(guard, strides, Dtype::kInt32);
  if (s.rois * s.channels == 0) return out;
  const Forward f{s,
                  boxes.rows,
                  meta.data,
                  out.y.data,
                  with_argmax ? static_cast<int*>(out.argmax->data) : nullptr,
                  guard.stream()};
  PYDL_CUDA_FLOAT_SWITCH(meta.dtype, run<T>(f));
  return out;
}

Tensor roi_pool_values(const Tensor& x, const Tensor& boxes, int64_t out_h, int64_t out_w, double scale) {
  return std::move(roi_pool(x, boxes, out_h, out_w, scale, false).y.tensor);
}

std::tuple<Tensor, Tensor> roi_pool_with_argmax(const Tensor& x, const Tensor& boxes, int64_t out_h, int64_t out_w,
                                                double scale) {
  Pooled out = roi_pool(x, boxes, out_h, out_w, scale, true);
  return {std::move(out.y.tensor), std::move(out.argmax->tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("roi_pool_values", TORCH_BOX(&roi_pool_values));
  m.impl("roi_pool_with_argmax", TORCH_BOX(&roi_pool_with_argmax));
}

}  // namespace pydl
