// RoIAlign, backward: dx sums, for each box in turn, the gradients of its bins with the weights of the forward.
//
// Who writes an element of dx does not depend on the threads: in the contiguous layout an item owns planes, in the
// channels-last layout some rows and channels of an image. Each adds up the image's boxes in their order.

#include "cpu/roi_spread.h"

namespace pydl::PYDL_ISA {
namespace {

// Where an item adds up: in dx itself, or in scratch memory where dx has a narrower type.
template <class C, class T>
inline C* sums_of(T* dx, void* scratch) {
  if constexpr (is_same<T, C>) {
    return dx;
  } else {
    return static_cast<C*>(scratch);
  }
}

template <class C>
inline void clear(C* p, int64_t count) {
  sweep<C>(count, [&](int64_t i, int, auto extent) { store(p + i, Vec<C>{}, extent); });
}

template <class T, class C>
inline void finish(T* dx, const C* sums, int64_t count) {
  sweep<C>(count, [&](int64_t i, int, auto extent) { store(dx + i, load(sums + i, extent), extent); });
}

// ---- channels-last layout

// U vectors of channels of one bin; `sums` points at row `top` of the item's rows.
template <int U, class T, class C, class Extent>
inline void add_bin(const T* dy, RoiTaps<C> rows, RoiTaps<C> cols, C* sums, int64_t row_step, int64_t pixel_step,
                    Extent extent) {
  Vec<C> v[U];
  for (int u = 0; u < U; ++u) v[u] = load(dy + u * kLanes<C>, extent);
  for (const RoiTap<C>& row : rows) {
    for (const RoiTap<C>& col : cols) {
      const Vec<C> weight = splat(row.weight * col.weight);
      C* p = sums + row.pixel * row_step + col.pixel * pixel_step;
      for (int u = 0; u < U; ++u) {
        C* at = p + u * kLanes<C>;
        store(at, load(at, extent) + weight * v[u], extent);
      }
    }
  }
}

// The taps of rows [low, high).
template <class C>
inline RoiTaps<C> within(RoiTaps<C> taps, int64_t low, int64_t high) {
  while (taps.first < taps.last && taps.first->pixel < low) ++taps.first;
  while (taps.first < taps.last && taps.last[-1].pixel >= high) --taps.last;
  return taps;
}

// Adds the boxes of image n to rows [low, high) and channels [c, c + count) of it. `sums` points at where pixel (0, 0)
// of these channels would be.
template <class T, class C>
void add_boxes(const RoiArgs& a, int64_t n, int64_t low, int64_t high, int64_t c, int64_t count, C* sums,
               int64_t pixel_step) {
  const RoiShape& s = a.shape;
  constexpr int L = kLanes<C>;
  for (int64_t i = a.image_start[n]; i < a.image_start[n + 1]; ++i) {
    const int64_t k = a.order[i];
    const RoiPlan& plan = a.plans[k];
    if (plan.rows.high <= low || plan.rows.low >= high) continue;
    const T* dy = static_cast<const T*>(a.in) + k * s.out_h * s.out_w * s.channels + c;
    for (int64_t oh = 0; oh < s.out_h; ++oh) {
      const RoiTaps<C> rows = within(taps_of<C>(plan, oh), low, high);
      if (rows.first == rows.last) continue;
      for (int64_t ow = 0; ow < s.out_w; ++ow) {
        const RoiTaps<C> cols = taps_of<C>(plan, s.out_h + ow);
        const T* from = dy + (oh * s.out_w + ow) * s.channels;
        const int64_t row_step = s.width * pixel_step;
        int64_t j = 0;
        for (; j + 4 * L <= count; j += 4 * L)
          add_bin<4>(from + j, rows, cols, sums + j, row_step, pixel_step, Whole{});
        for (; j + L <= count; j += L) add_bin<1>(from + j, rows, cols, sums + j, row_step, pixel_step, Whole{});
        if (j < count) add_bin<1>(from + j, rows, cols, sums + j, row_step, pixel_step, Part{count - j});
      }
    }
  }
}

// Items are blocks of rows of images, and of channels in them.
template <class T, class C>
void add_blocks(const RoiArgs& a, void* scratch, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  const int64_t row_blocks = ceil_div(s.height, a.block_rows), channel_blocks = ceil_div(s.channels, a.block_channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / (row_blocks * channel_blocks), low = item / channel_blocks % row_blocks * a.block_rows;
    const int64_t high = smaller(low + a.block_rows, s.height), c = item % channel_blocks * a.block_channels;
    const int64_t count = smaller(a.block_channels, s.channels - c), pixels = (high - low) * s.width;
    T* dx = static_cast<T*>(a.out) + (n * s.height + low) * s.width * s.channels + c;
    C* sums = sums_of<C>(dx, scratch);
    const int64_t step = is_same<T, C> ? s.channels : count;
    for (int64_t i = 0; i < pixels; ++i) clear(sums + i * step, count);
    add_boxes<T>(a, n, low, high, c, count, sums - low * s.width * step, step);
    if constexpr (!is_same<T, C>) {
      for (int64_t i = 0; i < pixels; ++i) finish(dx + i * s.channels, sums + i * step, count);
    }
  }
}

// ---- contiguous layout

// Adds the bins of one box and channel to a plane; dy is finite.
template <class C>
void add_plane(const RoiShape& s, const RoiPlan& plan, const RoiSpread<C>& spread, const C* dy, C* plane) {
  constexpr int L = kLanes<C>;
  for (int64_t i = 0; i < spread.width; i += L) {
    const int64_t first = spread.column[i / L * 2], last = spread.column[i / L * 2 + 1];
    const auto add = [&](auto extent) {
      for (int64_t oh = 0; oh < s.out_h; ++oh) {
        Vec<C> total = {};
        for (int64_t ow = first; ow < last; ++ow) {
          total += splat(dy[oh * s.out_w + ow]) * load(spread.weights + ow * spread.width + i);
        }
        for (const RoiTap<C>& row : taps_of<C>(plan, oh)) {
          C* at = plane + row.pixel * s.width + spread.left + i;
          store(at, load(at, extent) + splat(row.weight) * total, extent);
        }
      }
    };
    if (i + L <= spread.readable) {
      add(Whole{});
    } else {
      add(Part{spread.readable - i});
    }
  }
}

// The same bin by bin: the matrix multiplies by 0 where a bin does not reach, which an infinity would turn into NaN.
template <class C>
void add_plane_by_taps(const RoiShape& s, const RoiPlan& plan, const C* dy, C* plane) {
  for (int64_t oh = 0; oh < s.out_h; ++oh) {
    for (int64_t ow = 0; ow < s.out_w; ++ow, ++dy) {
      for (const RoiTap<C>& row : taps_of<C>(plan, oh)) {
        for (const RoiTap<C>& col : taps_of<C>(plan, s.out_h + ow)) {
          plane[row.pixel * s.width + col.pixel] += row.weight * col.weight * *dy;
        }
      }
    }
  }
}

// dy in the compute type; `odd` tells whether something is not finite.
template <class T, class C>
const C* widened(const T* dy, int64_t count, C* copy, bool& odd) {
  Mask<C> mask = {};
  sweep<C>(count, [&](int64_t i, int, auto extent) {
    const Vec<C> v = load(dy + i, extent);
    mask |= is_nan(v - v);
    if constexpr (!is_same<T, C>) store(copy + i, v, extent);
  });
  odd = any<C>(mask);
  if constexpr (is_same<T, C>) {
    return dy;
  } else {
    return copy;
  }
}

// Items are blocks of channels of images.
template <class T, class C>
void add_planes(const RoiArgs& a, void* scratch, int64_t begin, int64_t end) {
  const RoiShape& s = a.shape;
  const int64_t blocks = ceil_div(s.channels, a.block_channels), pixels = s.height * s.width, bins = s.out_h * s.out_w;
  C* copy = reinterpret_cast<C*>(static_cast<char*>(scratch) + roi_spread_bytes(a));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, c = item % blocks * a.block_channels;
    const int64_t count = smaller(a.block_channels, s.channels - c);
    T* dx = static_cast<T*>(a.out) + (n * s.channels + c) * pixels;
    C* sums = sums_of<C>(dx, copy + ceil_div(bins, 16) * 16);
    clear(sums, count * pixels);
    for (int64_t i = a.image_start[n]; i < a.image_start[n + 1]; ++i) {
      const int64_t k = a.order[i];
      const RoiPlan& plan = a.plans[k];
      RoiSpread<C> spread(a, plan, scratch);
      spread.by_bin(s, plan);
      const T* dy = static_cast<const T*>(a.in) + (k * s.channels + c) * bins;
      for (int64_t j = 0; j < count; ++j, dy += bins) {
        bool odd = false;
        const C* wide = widened(dy, bins, copy, odd);
        odd ? add_plane_by_taps(s, plan, wide, sums + j * pixels) : add_plane(s, plan, spread, wide, sums + j * pixels);
      }
    }
    if constexpr (!is_same<T, C>) finish(dx, sums, count * pixels);
  }
}

}  // namespace

// Blocks [begin, end) of the images' blocks of rows and channels, channels-last layout.
void roi_align_bwd_blocks(const RoiArgs& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, add_blocks<T, compute_t<T>>(a, scratch, begin, end));
}

// Blocks [begin, end) of the images' blocks of channels, contiguous layout.
void roi_align_bwd_planes(const RoiArgs& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, add_planes<T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace pydl::PYDL_ISA

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, roi_align_bwd_blocks, const RoiArgs&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, roi_align_bwd_planes, const RoiArgs&, void*, int64_t, int64_t)

namespace {

Tensor roi_align_bwd(const Tensor& dy_in, const Tensor& boxes, int64_t batch, int64_t height, int64_t width,
                     double scale, int64_t sampling, bool aligned, bool channels_last) {
  const char* const op = "roi_align_bwd";
  const RoiShape s =
      roi_grad_shape(op, Array(dy_in), Array(boxes), batch, height, width, scale, sampling, aligned, channels_last);
  const Tensor dy = dense_in(dy_in, channels_last);
  const Array grad(dy);
  Output dx = empty_roi(roi_strides(s, batch, s.channels, height, width), grad.dtype);
  const RoiPlans plans(op, s, boxes, grad.dtype);
  if (batch * s.channels == 0) return std::move(dx.tensor);
  RoiArgs a = plans.args(s, grad.dtype, grad.data, dx.data);
  const int64_t compute = host::size_of(host::compute_dtype(grad.dtype));
  const bool narrow = compute != host::size_of(grad.dtype);
  const int64_t work = 1 + s.rois / batch * s.out_h * s.out_w * 8;  // per channel of an image
  if (channels_last) {
    a.block_channels = std::min<int64_t>(s.channels, 64);
    a.block_rows = std::clamp<int64_t>(kRoiBlockBytes / (width * a.block_channels * compute), 1, height);
    const int64_t rows = (height + a.block_rows - 1) / a.block_rows;
    const int64_t items = batch * rows * ((s.channels + a.block_channels - 1) / a.block_channels);
    const int64_t bytes = narrow ? a.block_rows * width * a.block_channels * compute : 0;
    host::parallel(items, a.block_channels * (a.block_rows * width + work / rows), [&](int64_t begin, int64_t end) {
      const host::Scratch scratch(bytes);
      PYDL_CPU_DISPATCH(roi_align_bwd_blocks)(a, scratch.get(), begin, end);
    });
    return std::move(dx.tensor);
  }
  a.block_channels = roi_block_channels(s, compute, 1);
  const int64_t bins = (s.out_h * s.out_w + 15) / 16 * 16;
  const int64_t bytes = roi_spread_bytes(a) + (narrow ? (bins + a.block_channels * height * width) * compute : 0);
  const int64_t items = batch * ((s.channels + a.block_channels - 1) / a.block_channels);
  host::parallel(items, a.block_channels * (height * width + work), [&](int64_t begin, int64_t end) {
    const host::Scratch scratch(bytes);
    PYDL_CPU_DISPATCH(roi_align_bwd_planes)(a, scratch.get(), begin, end);
  });
  return std::move(dx.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("roi_align_bwd", TORCH_BOX(&roi_align_bwd)); }

}  // namespace
}  // namespace pydl

#endif
