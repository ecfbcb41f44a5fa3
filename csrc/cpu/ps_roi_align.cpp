// Position-sensitive RoIAlign (Dai et al., R-FCN, 2016), forward and backward: bin b of channel c reads channel
// c * bins + b, so that neighbouring elements of y read different pixels and nothing is left to vectorise.
//
// An item owns channels of an image, that is a bin of every box each, and takes the boxes in their order: in the
// contiguous layout a channel, whose plane stays in the cache; in the channels-last layout those of a cache line. There
// the forward takes box by box instead, since a tap is then the same for all channels of a bin.

#include "common/vec.h"
#include "cpu/roi_plan.h"

namespace pydl {

struct PsRoiArgs {
  RoiArgs roi;
  int64_t channels;  // of y
};

namespace PYDL_ISA {
namespace {

// The sum of no samples: a bin that has none is 0 / 0.
template <class C>
inline C nothing(const RoiPlan& plan) {
  return plan.undefined ? C(__builtin_nan("")) : C(0);
}

// Channels-last layout; items are boxes.
template <class T, class C>
void pool_boxes(const PsRoiArgs& a, int64_t begin, int64_t end) {
  const RoiShape& s = a.roi.shape;
  constexpr int kMany = 16;  // sums at once
  const int64_t bins = s.out_h * s.out_w;
  for (int64_t k = begin; k < end; ++k) {
    const RoiPlan& plan = a.roi.plans[k];
    const T* x = static_cast<const T*>(a.roi.in) + plan.image * s.height * s.width * s.channels;
    T* y = static_cast<T*>(a.roi.out) + k * a.channels * bins;
    for (int64_t bin = 0; bin < bins; ++bin) {
      const RoiTaps<C> rows = taps_of<C>(plan, bin / s.out_w), cols = taps_of<C>(plan, s.out_h + bin % s.out_w);
      for (int64_t first = 0; first < a.channels; first += kMany) {
        const int64_t count = smaller(kMany, a.channels - first);
        C sums[kMany];
        for (int64_t c = 0; c < count; ++c) sums[c] = nothing<C>(plan);
        for (const RoiTap<C>& row : rows) {
          for (const RoiTap<C>& col : cols) {
            const C weight = row.weight * col.weight;
            const T* from = x + (row.pixel * s.width + col.pixel) * s.channels + first * bins + bin;
            for (int64_t c = 0; c < count; ++c) sums[c] += weight * to_compute(from[c * bins]);
          }
        }
        for (int64_t c = 0; c < count; ++c) from_compute(sums[c], y + bin * a.channels + first + c);
      }
    }
  }
}

// Contiguous layout; items are channels of images of x.
template <class T, class C>
void pool_channels(const PsRoiArgs& a, int64_t begin, int64_t end) {
  const RoiShape& s = a.roi.shape;
  const int64_t bins = s.out_h * s.out_w;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / s.channels, channel = item % s.channels, bin = channel % bins;
    const T* x = static_cast<const T*>(a.roi.in) + item * s.height * s.width;
    for (int64_t i = a.roi.image_start[n]; i < a.roi.image_start[n + 1]; ++i) {
      const int64_t k = a.roi.order[i];
      const RoiPlan& plan = a.roi.plans[k];
      C total = nothing<C>(plan);
      for (const RoiTap<C>& row : taps_of<C>(plan, bin / s.out_w)) {
        for (const RoiTap<C>& col : taps_of<C>(plan, s.out_h + bin % s.out_w)) {
          total += row.weight * col.weight * to_compute(x[row.pixel * s.width + col.pixel]);
        }
      }
      from_compute(total, static_cast<T*>(a.roi.out) + k * s.channels + channel);
    }
  }
}

// Items are blocks of channels of images of dx; `sums` holds one, [pixels][channels], in the compute type.
template <class T, class C>
void add_blocks(const PsRoiArgs& a, C* sums, int64_t begin, int64_t end) {
  const RoiShape& s = a.roi.shape;
  const int64_t bins = s.out_h * s.out_w, pixels = s.height * s.width;
  const int64_t blocks = ceil_div(s.channels, a.roi.block_channels);
  const RoiSteps x_step = roi_steps(s, s.channels, pixels), y_step = roi_steps(s, a.channels, bins);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, first = item % blocks * a.roi.block_channels;
    const int64_t count = smaller(a.roi.block_channels, s.channels - first);
    for (int64_t i = 0; i < pixels * count; ++i) sums[i] = 0;
    for (int64_t i = a.roi.image_start[n]; i < a.roi.image_start[n + 1]; ++i) {
      const int64_t k = a.roi.order[i];
      const RoiPlan& plan = a.roi.plans[k];
      const T* from = static_cast<const T*>(a.roi.in) + k * a.channels * bins;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t bin = (first + c) % bins;
        const C dy = to_compute(from[(first + c) / bins * y_step.channel + bin * y_step.pixel]);
        for (const RoiTap<C>& row : taps_of<C>(plan, bin / s.out_w)) {
          C* to = sums + row.pixel * s.width * count + c;
          for (const RoiTap<C>& col : taps_of<C>(plan, s.out_h + bin % s.out_w)) {
            to[col.pixel * count] += row.weight * col.weight * dy;
          }
        }
      }
    }
    T* dx = static_cast<T*>(a.roi.out) + n * s.channels * pixels + first * x_step.channel;
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t c = 0; c < count; ++c) from_compute(sums[i * count + c], dx + i * x_step.pixel + c);
    }
  }
}

}  // namespace

// Boxes [begin, end) in the channels-last layout, channels [begin, end) of the images of x in the contiguous one.
void ps_roi_align_items(const PsRoiArgs& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.roi.dtype, a.roi.shape.channels_last ? pool_boxes<T, compute_t<T>>(a, begin, end)
                                                           : pool_channels<T, compute_t<T>>(a, begin, end));
}

// Blocks [begin, end) of a.roi.block_channels channels of the images of dx.
void ps_roi_align_blocks(const PsRoiArgs& a, void* sums, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.roi.dtype, add_blocks<T>(a, static_cast<compute_t<T>*>(sums), begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, ps_roi_align_items, const PsRoiArgs&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, ps_roi_align_blocks, const PsRoiArgs&, void*, int64_t, int64_t)

namespace {

Tensor ps_roi_align_fwd(const Tensor& x_in, const Tensor& boxes, int64_t out_h, int64_t out_w, double scale,
                        int64_t sampling) {
  const char* const op = "ps_roi_align";
  const RoiShape s = roi_shape(op, Array(x_in), Array(boxes), out_h, out_w, scale, sampling, true);
  const int64_t channels = ps_roi_channels_of(op, s);
  const Tensor x = dense_in(x_in, s.channels_last);
  const Array meta(x);
  Output y = empty_roi(roi_strides(s, s.rois, channels, out_h, out_w), meta.dtype);
  const RoiPlans plans(op, s, boxes, meta.dtype);
  const PsRoiArgs a{plans.args(s, meta.dtype, meta.data, y.data), channels};
  if (s.rois * s.channels == 0) return std::move(y.tensor);
  const int64_t items = s.channels_last ? s.rois : s.batch * s.channels;
  host::parallel(items, s.rois * s.channels / items * 16,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(ps_roi_align_items)(a, begin, end); });
  return std::move(y.tensor);
}

Tensor ps_roi_align_bwd(const Tensor& dy_in, const Tensor& boxes, int64_t batch, int64_t height, int64_t width,
                        double scale, int64_t sampling, bool channels_last) {
  const char* const op = "ps_roi_align_bwd";
  const RoiShape s =
      ps_roi_grad_shape(op, Array(dy_in), Array(boxes), batch, height, width, scale, sampling, channels_last);
  const Tensor dy = dense_in(dy_in, channels_last);
  const Array grad(dy);
  Output dx = empty_roi(roi_strides(s, batch, s.channels, height, width), grad.dtype);
  const RoiPlans plans(op, s, boxes, grad.dtype);
  if (batch * s.channels == 0) return std::move(dx.tensor);
  PsRoiArgs a{plans.args(s, grad.dtype, grad.data, dx.data), grad.sizes[1]};
  a.roi.block_channels = channels_last ? std::min<int64_t>(s.channels, 64 / host::size_of(grad.dtype)) : 1;
  const int64_t block = a.roi.block_channels * height * width, blocks = (s.channels - 1) / a.roi.block_channels + 1;
  host::parallel(batch * blocks, block + a.roi.block_channels * (s.rois / batch) * 16, [&](int64_t begin, int64_t end) {
    const host::Scratch sums(block * host::size_of(host::compute_dtype(grad.dtype)));
    PYDL_CPU_DISPATCH(ps_roi_align_blocks)(a, sums.get(), begin, end);
  });
  return std::move(dx.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("ps_roi_align_fwd", TORCH_BOX(&ps_roi_align_fwd));
  m.impl("ps_roi_align_bwd", TORCH_BOX(&ps_roi_align_bwd));
}

}  // namespace
}  // namespace pydl

#endif
