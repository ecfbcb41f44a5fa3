// RoI max pooling, backward without atomics, and its derivative. A block owns a tile of pixels of dx and some channels.
// It looks for the boxes that reach the tile; each pixel then takes the dy of the bins over it whose maximum it was.
#include "common/roi_window.h"
#include "cuda/roi_device.h"

namespace pydl {
namespace {

constexpr int kBatch = 8;  // boxes at a time
constexpr int kSide = 16;  // a tile is 16 x 16 pixels, one for each thread
constexpr int kChannels = 8;

// The rule of max pooling: the axes of a box.
struct Windows {
  __device__ static RoiWindow rows(const RoiShape& s, const RoiBox& box, bool wide) {
    return roi_window_rows(s, box, wide);
  }
  __device__ static RoiWindow columns(const RoiShape& s, const RoiBox& box, bool wide) {
    return roi_window_columns(s, box, wide);
  }
};

// V channels of a pixel.
template <typename T, int V>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_pool_bwd_kernel(const T* __restrict__ dy, const int* __restrict__ argmax, RoiRows boxes, RoiIndex index,
                        T* __restrict__ dx, RoiShape s, RoiSteps steps, int tiles_h, int tiles_w, int channel_blocks) {
  using A = acc_t<T>;
  PYDL_SHARED(int, ranges, kBatch * 2 * kSide * 2);
  PYDL_SHARED(int, numbers, kRoiThreads);
  PYDL_SHARED(int, counts, kRoiWarps);
  const RoiHits hits{numbers, counts};
  uint64_t block = blockIdx.x;
  const int64_t c = int64_t(take_digit(block, channel_blocks)) * V;
  const int col = take_digit(block, tiles_w) * kSide, row = take_digit(block, tiles_h) * kSide;
  const RoiTile tile{int(block), row, min(row + kSide, int(s.height)), col, min(col + kSide, int(s.width))};
  const int thread = int(threadIdx.x), y = row + thread / kSide, x = col + thread % kSide;
  const bool inside = y < tile.row_high && x < tile.col_high;
  const int position = y * int(s.width) + x, channels = min(V, int(s.channels - c));
  const int64_t bins = s.out_h * s.out_w;

  A sums[V] = {};
  for (int64_t chunk = 0; chunk < roi_chunks(s); ++chunk) {
    const int found = find_hits(index, s.rois, chunk, tile, hits);
    for (int done = 0; done < found; done += kBatch) {
      const int count = min(kBatch, found - done);
      for (int item = thread; item < count * 2 * kSide; item += kRoiThreads) {
        const int slot = item % (2 * kSide);
        const RoiBox box = box_at(boxes, chunk * kRoiThreads + numbers[done + item / (2 * kSide)]);
        const RoiRange over = slot < kSide ? roi_bins_over(roi_window_rows(s, box, boxes.wide), row + slot)
                                           : roi_bins_over(roi_window_columns(s, box, boxes.wide), col + slot - kSide);
        ranges[2 * item] = int(over.low);
        ranges[2 * item + 1] = int(over.high);
      }
      __syncthreads();
      for (int b = 0; b < count && inside; ++b) {
        const int rows = 2 * (b * 2 * kSide + thread / kSide), cols = 2 * (b * 2 * kSide + kSide + thread % kSide);
        const int64_t first = (chunk * kRoiThreads + numbers[done + b]) * s.channels * bins + c * steps.y_channel;
        for (int i = ranges[rows]; i < ranges[rows + 1]; ++i) {
          for (int j = ranges[cols]; j < ranges[cols + 1]; ++j) {
            const int64_t at = first + (int64_t(i) * s.out_w + j) * steps.y_pixel;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const int64_t place = at + v * steps.y_channel;
              if (v < channels && argmax[place] == position) sums[v] += to_acc(dy[place]);
            }
          }
        }
      }
      __syncthreads();
    }
  }
  if (!inside) return;
  T* to = dx + (int64_t(tile.image) * s.height * s.width * s.channels) + c * steps.x_channel +
          int64_t(position) * steps.x_pixel;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v < channels) to[v * steps.x_channel] = from_acc<T>(sums[v]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_pool_gather_kernel(const T* __restrict__ x, const int* __restrict__ argmax, RoiRows boxes, T* __restrict__ y,
                           RoiShape s, RoiSteps steps, uint64_t elements) {
  uint64_t item = thread_item();
  if (item >= elements) return;
  const int64_t at = int64_t(item);
  int64_t c;
  if (s.channels_last) {
    c = take_digit(item, int(s.channels));
    item /= uint64_t(s.out_h * s.out_w);
  } else {
    item /= uint64_t(s.out_h * s.out_w);
    c = take_digit(item, int(s.channels));
  }
  const int64_t image = roi_image(s, box_at(boxes, int64_t(item))), position = argmax[at];
  const bool inside = image >= 0 && position >= 0 && position < s.height * s.width;
  y[at] = inside ? x[image * s.channels * s.height * s.width + c * steps.x_channel + position * steps.x_pixel]
                 : from_acc<T>(0);
}

// ---- host functions

template <typename T>
void launch_backward(const RoiShape& s, const RoiRows& boxes, const RoiIndex& index, const void* dy, const int* argmax,
                     void* dx, cudaStream_t stream) {
  const int64_t tiles_h = ceil_div(s.height, int64_t(kSide)), tiles_w = ceil_div(s.width, int64_t(kSide));
  const int64_t channel_blocks = ceil_div(s.channels, int64_t(kChannels));
  PYDL_LAUNCH((roi_pool_bwd_kernel<T, kChannels>),
              roi_grid("roi_pool_bwd", s.batch * tiles_h * tiles_w * channel_blocks), kRoiThreads, 0, stream,
              static_cast<const T*>(dy), argmax, boxes, index, static_cast<T*>(dx), s, roi_steps(s, s.channels),
              int(tiles_h), int(tiles_w), int(channel_blocks));
}

Tensor roi_pool_bwd(const Tensor& dy_in, const Tensor& argmax_in, const Tensor& boxes_in, int64_t batch, int64_t height,
                    int64_t width, double scale) {
  const char* const op = "roi_pool_bwd";
  const RoiShape s = roi_argmax_shape(op, Array(dy_in), Array(argmax_in), Array(boxes_in), batch, height, width, scale);
  STD_TORCH_CHECK(host::is_floating(Array(dy_in).dtype), op, ": dy must be float32, float64, float16 or bfloat16");
  check_roi_coordinates(op, s);
  const DeviceGuard guard(dy_in);
  guard.check_same(op, "argmax", argmax_in);
  guard.check_same(op, "boxes", boxes_in);
  const Tensor dy = dense_in(dy_in, s.channels_last), argmax = dense_in(argmax_in, s.channels_last);
  const RoiInput boxes(boxes_in);
  const Array grad(dy), positions(argmax);
  Output dx = empty_roi(guard, roi_strides(s, batch, s.channels, height, width), grad.dtype);
  if (batch * s.channels == 0) return std::move(dx.tensor);
  const RoiIndexed<Windows> indexed(guard, op, s, boxes.rows);
  PYDL_CUDA_FLOAT_SWITCH(
      grad.dtype, launch_backward<T>(s, boxes.rows, indexed.index, grad.data, static_cast<const int*>(positions.data),
                                     dx.data, guard.stream()));
  return std::move(dx.tensor);
}

// `scale` is for the derivative, which needs it to find the bins over a pixel.
Tensor roi_pool_gather(const Tensor& x_in, const Tensor& argmax_in, const Tensor& boxes_in, double scale) {
  const char* const op = "roi_pool_gather";
  const Array given(x_in);
  STD_TORCH_CHECK(given.dim == 4 && host::is_floating(given.dtype), op, ": x must be floating with 4 dimensions");
  const RoiShape s = roi_argmax_shape(op, Array(argmax_in), Array(argmax_in), Array(boxes_in), given.sizes[0],
                                      given.sizes[2], given.sizes[3], scale);
  STD_TORCH_CHECK(given.sizes[1] == s.channels, op, ": x must have ", s.channels, " channels, got ", given.sizes[1]);
  check_roi_coordinates(op, s);
  const DeviceGuard guard(x_in);
  guard.check_same(op, "argmax", argmax_in);
  guard.check_same(op, "boxes", boxes_in);
  const Tensor x = dense_in(x_in, s.channels_last), argmax = dense_in(argmax_in, s.channels_last);
  const RoiInput boxes(boxes_in);
  Output y = empty_roi(guard, roi_strides(s, s.rois, s.channels, s.out_h, s.out_w), given.dtype);
  const int64_t elements = s.rois * s.channels * s.out_h * s.out_w;
  if (elements == 0) return std::move(y.tensor);
  PYDL_CUDA_FLOAT_SWITCH(
      given.dtype,
      PYDL_LAUNCH(roi_pool_gather_kernel<T>, roi_grid(op, ceil_div(elements, int64_t(kRoiThreads))), kRoiThreads, 0,
                  guard.stream(), static_cast<const T*>(Array(x).data), static_cast<const int*>(Array(argmax).data),
                  boxes.rows, static_cast<T*>(y.data), s, roi_steps(s, s.channels), uint64_t(elements)));
  return std::move(y.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("roi_pool_bwd", TORCH_BOX(&roi_pool_bwd));
  m.impl("roi_pool_gather", TORCH_BOX(&roi_pool_gather));
}

}  // namespace pydl
