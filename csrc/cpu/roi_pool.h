// What the files of RoI max pooling share: the windows of each box. The first part is plain data.
#pragma once

#include "common/roi_window.h"
#include "cpu/roi_plan.h"

namespace pydl {

struct RoiWindows {
  int64_t image;
  bool finite;
  RoiRange cols;            // all columns that the box reads
  const RoiRange* windows;  // [out_h + out_w], rows of bins and columns of bins
};

struct RoiPoolArgs {
  RoiShape shape;
  Dtype dtype;
  const RoiWindows* boxes;     // one for each box
  const int64_t* order;        // boxes sorted by image, those of an image in their order
  const int64_t* image_start;  // where in `order` an image's boxes start, and the end
  const void* in;              // forward and gather: x; backward: dy
  void* out;                   // forward and gather: y; backward: dx
  int32_t* argmax;             // position row * width + col, -1 for none; null: values only
  int64_t block_channels;      // channels behind an item
};

namespace {

// Elements of a row of columns, to whole vectors.
inline int64_t roi_pool_columns(const RoiShape& s) { return (s.width + 31) / 16 * 16; }

}  // namespace
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {
namespace {

// The windows of all boxes and the memory behind them.
class RoiPoolBoxes {
 public:
  RoiPoolBoxes(const char* op, const RoiShape& s, const Tensor& boxes)
      : boxes_(size_t(s.rois)), windows_(size_t(s.rois * (s.out_h + s.out_w))) {
    const RoiBoxes all(op, s, boxes);
    RoiRange* next = windows_.data();
    for (int64_t k = 0; k < s.rois; ++k) {
      const RoiBox box = all[k];
      const RoiWindow rows = roi_window_rows(s, box, all.wide()), cols = roi_window_columns(s, box, all.wide());
      boxes_[size_t(k)] = {roi_image(s, box), rows.finite && cols.finite, roi_pixels_under(cols), next};
      for (int64_t bin = 0; bin < s.out_h; ++bin) *next++ = roi_pixels(rows, bin);
      for (int64_t bin = 0; bin < s.out_w; ++bin) *next++ = roi_pixels(cols, bin);
    }
    sort_by_image(s, [&](int64_t k) { return boxes_[size_t(k)].image; }, order_, image_start_);
  }

  RoiPoolArgs args(const RoiShape& s, Dtype dtype) const {
    return {s, dtype, boxes_.data(), order_.data(), image_start_.data(), nullptr, nullptr, nullptr, 0};
  }

 private:
  std::vector<RoiWindows> boxes_;
  std::vector<RoiRange> windows_;
  std::vector<int64_t> order_, image_start_;
};

}  // namespace
}  // namespace pydl

#endif
