// RoI max pooling, backward and its derivative: dy goes to the position of its maximum.
//
// An item owns channels of an image and adds the image's boxes in their order, so that results do not depend on the
// threads. Positions that lie outside the plane are skipped.

#include "common/vec.h"
#include "cpu/roi_pool.h"

namespace pydl::PYDL_ISA {
namespace {

// Calls f(channel, place in y) for the elements of a box and a range of channels, in the order of memory.
template <class F>
inline void each_element(const RoiShape& s, int64_t k, int64_t first, int64_t last, F&& f) {
  const int64_t bins = s.out_h * s.out_w, start = k * s.channels * bins;
  if (s.channels_last) {
    for (int64_t bin = 0; bin < bins; ++bin) {
      for (int64_t c = first; c < last; ++c) f(c, start + bin * s.channels + c);
    }
  } else {
    for (int64_t c = first; c < last; ++c) {
      for (int64_t bin = 0; bin < bins; ++bin) f(c, start + c * bins + bin);
    }
  }
}

// Items are blocks of channels of images; `sums` holds one of the compute type unless that is T.
template <class T, class C>
void scatter(const RoiPoolArgs& a, C* sums, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  const int64_t blocks = ceil_div(s.channels, a.block_channels), pixels = s.height * s.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, first = item % blocks * a.block_channels;
    const int64_t last = smaller(first + a.block_channels, s.channels), count = last - first;
    const RoiSteps x = roi_steps(s, s.channels, pixels);
    T* dx = static_cast<T*>(a.out) + n * s.channels * pixels + first * x.channel;
    // scratch memory holds the block alone, in the layout of dx
    const RoiSteps step = is_same<T, C> ? x : roi_steps(s, count, pixels);
    if constexpr (is_same<T, C>) sums = dx;
    const int64_t rows = s.channels_last ? pixels : count, length = s.channels_last ? count : pixels;
    const int64_t row = s.channels_last ? step.pixel : step.channel;
    for (int64_t r = 0; r < rows; ++r) {
      sweep<C>(length, [&](int64_t i, int, auto extent) { store(sums + r * row + i, Vec<C>{}, extent); });
    }
    for (int64_t i = a.image_start[n]; i < a.image_start[n + 1]; ++i) {
      each_element(s, a.order[i], first, last, [&](int64_t c, int64_t at) {
        const int64_t position = a.argmax[at];
        if (position < 0 || position >= pixels) return;
        sums[(c - first) * step.channel + position * step.pixel] += to_compute(static_cast<const T*>(a.in)[at]);
      });
    }
    if constexpr (!is_same<T, C>) {
      const int64_t to_row = s.channels_last ? x.pixel : x.channel;
      for (int64_t r = 0; r < rows; ++r) {
        sweep<C>(length, [&](int64_t i, int, auto extent) {
          store(dx + r * to_row + i, load(sums + r * row + i, extent), extent);
        });
      }
    }
  }
}

// Items are boxes.
template <class T>
void gather(const RoiPoolArgs& a, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  const int64_t pixels = s.height * s.width;
  const RoiSteps step = roi_steps(s, s.channels, pixels);
  for (int64_t k = begin; k < end; ++k) {
    const T* x = static_cast<const T*>(a.in) + a.boxes[k].image * s.channels * pixels;
    each_element(s, k, 0, s.channels, [&](int64_t c, int64_t at) {
      const int64_t position = a.argmax[at];
      const bool inside = position >= 0 && position < pixels;
      static_cast<T*>(a.out)[at] = inside ? x[c * step.channel + position * step.pixel] : T{};
    });
  }
}

}  // namespace

// Blocks [begin, end) of a.block_channels channels of the images of dx.
void roi_pool_scatter(const RoiPoolArgs& a, void* sums, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, scatter<T>(a, static_cast<compute_t<T>*>(sums), begin, end));
}

// Boxes [begin, end).
void roi_pool_pick(const RoiPoolArgs& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, gather<T>(a, begin, end));
}

}  // namespace pydl::PYDL_ISA

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, roi_pool_scatter, const RoiPoolArgs&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, roi_pool_pick, const RoiPoolArgs&, int64_t, int64_t)

namespace {

Tensor roi_pool_bwd(const Tensor& dy_in, const Tensor& argmax_in, const Tensor& boxes, int64_t batch, int64_t height,
                    int64_t width, double scale) {
  const char* const op = "roi_pool_bwd";
  const RoiShape s = roi_argmax_shape(op, Array(dy_in), Array(argmax_in), Array(boxes), batch, height, width, scale);
  STD_TORCH_CHECK(host::is_floating(Array(dy_in).dtype), op, ": dy must be float32, float64, float16 or bfloat16");
  const Tensor dy = dense_in(dy_in, s.channels_last), argmax = dense_in(argmax_in, s.channels_last);
  const Array grad(dy);
  Output dx = empty_roi(roi_strides(s, batch, s.channels, height, width), grad.dtype);
  if (batch * s.channels == 0) return std::move(dx.tensor);
  const RoiPoolBoxes windows(op, s, boxes);
  RoiPoolArgs a = windows.args(s, grad.dtype);
  a.in = grad.data;
  a.out = dx.data;
  a.argmax = static_cast<int32_t*>(Array(argmax).data);
  const int64_t compute = host::size_of(host::compute_dtype(grad.dtype)), pixels = height * width;
  // neighbouring channels share the cache lines of a pixel
  a.block_channels = roi_block_channels(s, compute, s.channels_last ? 16 : 1);
  const int64_t bytes = compute == host::size_of(grad.dtype) ? 0 : a.block_channels * pixels * compute;
  const int64_t items = batch * ((s.channels + a.block_channels - 1) / a.block_channels);
  host::parallel(items, a.block_channels * (pixels + s.rois / batch * s.out_h * s.out_w * 4),
                 [&](int64_t begin, int64_t end) {
                   const host::Scratch sums(bytes);
                   PYDL_CPU_DISPATCH(roi_pool_scatter)(a, sums.get(), begin, end);
                 });
  return std::move(dx.tensor);
}

// `scale` is for the derivative, which needs it to find the bins over a pixel.
Tensor roi_pool_gather(const Tensor& x_in, const Tensor& argmax_in, const Tensor& boxes, double scale) {
  const char* const op = "roi_pool_gather";
  const Array given(x_in);
  STD_TORCH_CHECK(given.dim == 4 && host::is_floating(given.dtype), op, ": x must be floating with 4 dimensions");
  const RoiShape s = roi_argmax_shape(op, Array(argmax_in), Array(argmax_in), Array(boxes), given.sizes[0],
                                      given.sizes[2], given.sizes[3], scale);
  STD_TORCH_CHECK(given.sizes[1] == s.channels, op, ": x must have ", s.channels, " channels, got ", given.sizes[1]);
  const Tensor x = dense_in(x_in, s.channels_last), argmax = dense_in(argmax_in, s.channels_last);
  Output y = empty_roi(roi_strides(s, s.rois, s.channels, s.out_h, s.out_w), given.dtype);
  const RoiPoolBoxes windows(op, s, boxes);
  RoiPoolArgs a = windows.args(s, given.dtype);
  a.in = Array(x).data;
  a.out = y.data;
  a.argmax = static_cast<int32_t*>(Array(argmax).data);
  host::parallel(s.rois, s.channels * s.out_h * s.out_w * 4,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(roi_pool_pick)(a, begin, end); });
  return std::move(y.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("roi_pool_bwd", TORCH_BOX(&roi_pool_bwd));
  m.impl("roi_pool_gather", TORCH_BOX(&roi_pool_gather));
}

}  // namespace
}  // namespace pydl

#endif
