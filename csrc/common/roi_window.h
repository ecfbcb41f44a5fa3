// Max pooling over regions of interest: the window of whole pixels of each bin along one axis (Girshick, Fast R-CNN,
// 2015). The bounds of a box are rounded and both in it, windows are found from its start. Shared like roi.h.
//
// Rounding decides which pixels belong to a bin, so the arithmetic is that of the boxes' dtype, operation by operation:
// in float32 the last of 7 bins of a box of 57 pixels ends at pixel 58.
#pragma once

#include "common/roi.h"

namespace pydl {

// What a bin holds before its first pixel: the lowest float32, as torchvision has it.
constexpr float kRoiLowest = -3.402823466e+38f;

struct RoiWindow {
  double start, step;
  int64_t length, bins;
  bool wide, finite;
};

namespace {

// Operations of float32, or of float64 if `wide`. Products and quotients of float32 numbers are rounded once, since
// float64 holds more than twice their digits.
PYDL_HOST_DEVICE inline double roi_rounded(bool wide, double v) { return wide ? v : double(float(v)); }

// To the nearest integer, halves away from 0. No difference is taken that could be contracted with the product in v.
PYDL_HOST_DEVICE inline double roi_nearest(double v) {
  const double size = v < 0 ? -v : v, whole = roi_floor(size), nearest = size >= whole + 0.5 ? whole + 1 : whole;
  return v < 0 ? -nearest : nearest;
}

PYDL_HOST_DEVICE inline RoiWindow roi_window(const RoiShape& s, bool wide, double low, double high, int64_t length,
                                             int64_t bins) {
  const double scale = roi_rounded(wide, s.scale);
  double start = roi_nearest(roi_rounded(wide, low * scale)), end = roi_nearest(roi_rounded(wide, high * scale));
  const bool finite = start - start == 0 && end - end == 0;
  constexpr double kFar = 0x1p40;  // sums of coordinates stay exact
  start = start < -kFar ? -kFar : start > kFar ? kFar : start;
  end = end < -kFar ? -kFar : end > kFar ? kFar : end;
  double size = end - start + 1;
  if (!(size > 1)) size = 1;
  return {start, roi_rounded(wide, roi_rounded(wide, size) / double(bins)), length, bins, wide, finite};
}

// Pixels [low, high) of a bin; none if it lies beside the map.
PYDL_HOST_DEVICE inline RoiRange roi_pixels(const RoiWindow& w, int64_t bin) {
  if (!w.finite) return {0, 0};
  const double low = roi_floor(roi_rounded(w.wide, double(bin) * w.step)) + w.start;
  const double high = w.start - roi_floor(-roi_rounded(w.wide, double(bin + 1) * w.step)), end = double(w.length);
  return {low > 0 ? int64_t(low < end ? low : end) : 0, high > 0 ? int64_t(high < end ? high : end) : 0};
}

// Bins [low, high) that a pixel belongs to, by bisection: both ends of a window grow with the bin.
PYDL_HOST_DEVICE inline RoiRange roi_bins_over(const RoiWindow& w, int64_t pixel) {
  int64_t first = 0, last = w.bins;
  while (first < last) {  // the first bin that ends behind the pixel
    const int64_t middle = first + (last - first) / 2;
    if (roi_pixels(w, middle).high > pixel) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  int64_t end = first, most = w.bins;
  while (end < most) {  // the first that starts behind it
    const int64_t middle = end + (most - end) / 2;
    if (roi_pixels(w, middle).low > pixel) {
      most = middle;
    } else {
      end = middle + 1;
    }
  }
  return {first, end};
}

PYDL_HOST_DEVICE inline RoiRange roi_pixels_under(const RoiWindow& w) {
  return {roi_pixels(w, 0).low, roi_pixels(w, w.bins - 1).high};
}

PYDL_HOST_DEVICE inline RoiWindow roi_window_rows(const RoiShape& s, const RoiBox& box, bool wide) {
  return roi_window(s, wide, box.y1, box.y2, s.height, s.out_h);
}
PYDL_HOST_DEVICE inline RoiWindow roi_window_columns(const RoiShape& s, const RoiBox& box, bool wide) {
  return roi_window(s, wide, box.x1, box.x2, s.width, s.out_w);
}

}  // namespace
}  // namespace pydl
