// Pooling over regions of interest: from a box to bins, from a bin to sample points, from those to weighted pixels.
// Shared by the CPU kernels, the CUDA kernels and the host functions of both; plain data, no standard library.
//
// Bilinear samples on a grid are separable: the weight of pixel (y, x) in bin (i, j) is the product of a weight of row
// y in bin i and one of column x in bin j. So everything below is about one axis, and a bin's samples are merged into
// one weight per pixel: 2 x 2 samples touch at most 4 x 4 pixels, mostly 3 x 3, not 16. Positions are computed in
// float64, weights are rounded once.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define PYDL_HOST_DEVICE __host__ __device__
#else
#define PYDL_HOST_DEVICE
#endif

namespace pydl {

// Sizes and rules of one call. y is [rois, out_channels, out_h, out_w]; x is [batch, channels, height, width].
struct RoiShape {
  int64_t rois, batch, channels, height, width, out_h, out_w;
  double scale;
  int64_t sampling;  // samples per bin and axis; 0 or less: one per pixel, rounded up
  bool aligned;      // boxes are shifted by half a pixel and may be empty
  bool channels_last;
};

// A row of `boxes`: number of the image, then two corners.
struct RoiBox {
  double image, x1, y1, x2, y2;
};

// One axis of one box: `bins` bins of width `step` from `start`, each with `samples` equidistant samples, on a map of
// `length` pixels.
struct RoiAxis {
  double start, step, samples;
  int64_t length, bins;
};

// Samples [first, first + count) of a bin: at least those at positions in [low, high]. They are numbered by ascending
// position, whatever the sign of the step.
struct RoiSamples {
  double first;
  int64_t count;
};

// Bins or pixels [low, high).
struct RoiRange {
  int64_t low, high;
};

// What a sample reads: pixels `low` and low + 1 with their weights, the second of which is 0 at the end of the map; or
// nothing, outside [-1, length].
struct RoiPoint {
  int64_t low;
  double at_low, at_high;
  bool inside;
};

namespace {

template <typename B>
PYDL_HOST_DEVICE inline RoiBox roi_box(const B* boxes, int64_t k) {
  const B* row = boxes + k * 5;
  return {double(row[0]), double(row[1]), double(row[2]), double(row[3]), double(row[4])};
}

// The image of a box, -1 if there is none of that number. Fractions are cut off.
PYDL_HOST_DEVICE inline int64_t roi_image(const RoiShape& s, const RoiBox& box) {
  return box.image > -1 && box.image < double(s.batch) ? int64_t(box.image) : -1;
}

PYDL_HOST_DEVICE inline double roi_floor(double v) {
  if (!(v > -0x1p62 && v < 0x1p62)) return v;
  const double whole = double(int64_t(v));
  return whole > v ? whole - 1 : whole;
}

PYDL_HOST_DEVICE inline RoiAxis roi_axis(const RoiShape& s, double low, double high, int64_t length, int64_t bins) {
  const double offset = s.aligned ? 0.5 : 0.0;
  RoiAxis a{low * s.scale - offset, high * s.scale - offset, 0, length, bins};
  double size = a.step - a.start;
  if (!s.aligned && size < 1) size = 1;
  a.step = size / double(bins);
  a.samples = s.sampling > 0 ? double(s.sampling) : -roi_floor(-a.step);
  if (!(a.start - a.start == 0 && size - size == 0)) {  // a box that is not finite: one sample, at NaN
    a.start = a.start - a.start + (size - size);
    a.step = 0;
    a.samples = 1;
  }
  return a;
}

PYDL_HOST_DEVICE inline RoiAxis roi_rows(const RoiShape& s, const RoiBox& box) {
  return roi_axis(s, box.y1, box.y2, s.height, s.out_h);
}
PYDL_HOST_DEVICE inline RoiAxis roi_columns(const RoiShape& s, const RoiBox& box) {
  return roi_axis(s, box.x1, box.x2, s.width, s.out_w);
}

// Distance between samples; 0 if all of a bin are at one place, and the first stands for them.
PYDL_HOST_DEVICE inline double roi_pitch(const RoiAxis& a) { return (a.step < 0 ? -a.step : a.step) / a.samples; }

PYDL_HOST_DEVICE inline RoiSamples roi_samples(const RoiAxis& a, int64_t bin, double low, double high) {
  if (!(a.samples >= 1)) return {0, 0};
  const double pitch = roi_pitch(a), origin = a.start + double(bin) * a.step;
  if (!(pitch > 0)) return {0, 1};
  const double end = a.step < 0 ? origin + a.step : origin;
  double first = roi_floor((low - end) / pitch - 0.5) - 1, last = roi_floor((high - end) / pitch - 0.5) + 3;
  if (!(first > 0)) first = 0;
  if (!(last < a.samples)) last = a.samples;
  if (!(last > first)) return {0, 0};
  return {first, int64_t(last - first)};
}

PYDL_HOST_DEVICE inline RoiPoint roi_point(const RoiAxis& a, int64_t bin, double sample) {
  const double n = a.step < 0 ? a.samples - 1 - sample : sample;
  const double at = a.start + double(bin) * a.step + (n + 0.5) * a.step / a.samples;
  if (at != at) return {0, at, 0, true};
  if (at < -1 || at > double(a.length)) return {0, 0, 0, false};
  if (at <= 0) return {0, 1, 0, true};
  const int64_t low = int64_t(at);
  if (low >= a.length - 1) return {a.length - 1, 1, 0, true};
  return {low, 1 - (at - double(low)), at - double(low), true};
}

// Calls emit(pixel, weight) for the pixels under some samples of a bin: ascending, each once, none with weight 0.
template <typename F>
PYDL_HOST_DEVICE inline void roi_taps(const RoiAxis& a, int64_t bin, RoiSamples samples, F emit) {
  const double count = roi_pitch(a) > 0 ? a.samples : 1;
  int64_t low = -2;  // the last two pixels, whose weights may still grow
  double at_low = 0, at_high = 0;
  const auto flush = [&](int64_t next) {
    if (at_low != 0) emit(low, at_low / count);
    if (next == low + 1) {
      at_low = at_high;
    } else {
      if (at_high != 0) emit(low + 1, at_high / count);
      at_low = 0;
    }
    low = next;
    at_high = 0;
  };
  for (int64_t i = 0; i < samples.count; ++i) {
    const RoiPoint p = roi_point(a, bin, samples.first + double(i));
    if (!p.inside) continue;
    if (p.low != low) flush(p.low);
    at_low += p.at_low;
    at_high += p.at_high;
  }
  flush(-4);
}

// The weight of one pixel in a bin, as roi_taps gives it.
PYDL_HOST_DEVICE inline double roi_weight(const RoiAxis& a, int64_t bin, int64_t pixel) {
  const RoiSamples samples = roi_samples(a, bin, double(pixel - 1), double(pixel + 1));
  double weight = 0;
  for (int64_t i = 0; i < samples.count; ++i) {
    const RoiPoint p = roi_point(a, bin, samples.first + double(i));
    if (!p.inside) continue;
    if (p.low == pixel) weight += p.at_low;
    if (p.low + 1 == pixel) weight += p.at_high;
  }
  return roi_pitch(a) > 0 ? weight / a.samples : weight;
}

// Bins [low, high) that may read a pixel.
PYDL_HOST_DEVICE inline RoiRange roi_bins_over(const RoiAxis& a, int64_t pixel) {
  if (!(a.samples >= 1)) return {0, 0};
  if (!(a.step < 0 || a.step > 0)) return {0, a.bins};
  constexpr double kSlack = 1e-9;  // bins: no sample lies so near to the edge of its bin that rounding takes it across
  const double one = (double(pixel - 1) - a.start) / a.step, other = (double(pixel + 1) - a.start) / a.step;
  const double first = roi_floor((one < other ? one : other) - kSlack);
  const double last = roi_floor((one < other ? other : one) + kSlack) + 1;
  const double most = double(a.bins);
  return {first > 0 ? int64_t(first < most ? first : most) : 0, last > 0 ? int64_t(last < most ? last : most) : 0};
}

// Pixels [low, high) that a box may read.
PYDL_HOST_DEVICE inline RoiRange roi_pixels_under(const RoiAxis& a) {
  if (a.start != a.start) return {0, 1};
  const double end = a.start + double(a.bins) * a.step;
  const double low = a.start < end ? a.start : end, high = a.start < end ? end : a.start;
  if (!(a.samples >= 1) || high < -1 || low > double(a.length)) return {0, 0};
  const int64_t first = low > 0 ? int64_t(low) : 0,
                last = high > 0 && high < double(a.length) ? int64_t(high) + 2 : a.length;
  return {first < a.length ? first : a.length - 1, high > 0 ? (last < a.length ? last : a.length) : 1};
}

// A bin without samples, which has no mean.
PYDL_HOST_DEVICE inline bool roi_undefined(const RoiAxis& a) { return a.samples == 0; }

}  // namespace
}  // namespace pydl
