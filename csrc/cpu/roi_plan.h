// What the CPU kernels of RoI pooling know of each box: its image and, for each row and column of bins, the pixels that
// it reads with their weights. Made once per call by the host functions; the first part is plain data.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/roi.h"

namespace pydl {

template <class C>
struct RoiTap {
  int64_t pixel;
  C weight;
};

struct RoiPlan {
  int64_t image;
  bool undefined;         // a bin without samples: 0 / 0
  RoiRange rows, cols;    // that the box reads
  const int64_t* starts;  // of the taps of out_h rows of bins, then of out_w columns, and the end
  const void* taps;       // RoiTap of the compute type
};

struct RoiArgs {
  RoiShape shape;
  Dtype dtype;
  const RoiPlan* plans;        // one for each box
  const int64_t* order;        // backward: boxes sorted by image, those of an image in their order
  const int64_t* image_start;  // where in `order` an image's boxes start, and the end
  const void* in;              // forward: x; backward: dy
  void* out;                   // forward: y; backward: dx
  int64_t widest;              // columns of the map that the widest box reads
  int64_t block_rows;          // backward, channels-last layout: rows of dx behind an item
  int64_t block_channels;      // channels behind an item
};

namespace PYDL_ISA {
namespace {

// Taps [first, last) of a bin, in ascending order of their pixels.
template <class C>
struct RoiTaps {
  const RoiTap<C>* first;
  const RoiTap<C>* last;
  const RoiTap<C>* begin() const { return first; }
  const RoiTap<C>* end() const { return last; }
};

// Of row `bin` of bins, or of column bin - out_h.
template <class C>
inline RoiTaps<C> taps_of(const RoiPlan& plan, int64_t bin) {
  const RoiTap<C>* all = static_cast<const RoiTap<C>*>(plan.taps);
  return {all + plan.starts[bin], all + plan.starts[bin + 1]};
}

// Distances between channels and pixels of [N, channels, pixels], by layout.
struct RoiSteps {
  int64_t channel, pixel;
};
inline RoiSteps roi_steps(const RoiShape& s, int64_t channels, int64_t pixels) {
  return s.channels_last ? RoiSteps{1, channels} : RoiSteps{pixels, 1};
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

#include "common/roi_host.h"

namespace pydl {
namespace {

// What an item of the backward or of the contiguous layout works on stays in the second-level cache while box after box
// comes by.
constexpr int64_t kRoiBlockBytes = 1 << 19;

inline int64_t roi_block_channels(const RoiShape& s, int64_t bytes, int64_t least) {
  return std::min(s.channels, std::clamp<int64_t>(kRoiBlockBytes / (s.height * s.width * bytes), least, 64));
}

inline Output empty_roi(const RoiStrides& t, Dtype dtype) { return host::empty_strided(t.sizes, t.strides, 4, dtype); }

// The rows of a [K, 5] tensor, every one of which belongs to an image.
class RoiBoxes {
 public:
  RoiBoxes(const char* op, const RoiShape& s, const Tensor& boxes) : kept_(host::as_contiguous(boxes)), data_(kept_) {
    for (int64_t k = 0; k < s.rois; ++k) {
      const double image = (*this)[k].image;
      STD_TORCH_CHECK(roi_image(s, (*this)[k]) >= 0, op, ": argument 'boxes' must name images in [0, ", s.batch,
                      ") in its first column, got ", image, " in row ", k);
    }
  }
  RoiBox operator[](int64_t k) const {
    return wide() ? roi_box(static_cast<const double*>(data_.data), k)
                  : roi_box(static_cast<const float*>(data_.data), k);
  }
  bool wide() const { return data_.dtype == Dtype::kDouble; }

 private:
  Tensor kept_;
  Array data_;
};

// Numbers of the boxes, those of image n in their order from order[start[n]] to order[start[n + 1]].
template <class F>
inline void sort_by_image(const RoiShape& s, const F& image_of, std::vector<int64_t>& order,
                          std::vector<int64_t>& start) {
  start.assign(size_t(s.batch) + 1, 0);
  for (int64_t k = 0; k < s.rois; ++k) ++start[size_t(image_of(k)) + 1];
  for (size_t n = 0; n < size_t(s.batch); ++n) start[n + 1] += start[n];
  std::vector<int64_t> next(start);
  order.resize(size_t(s.rois));
  for (int64_t k = 0; k < s.rois; ++k) order[size_t(next[size_t(image_of(k))]++)] = k;
}

// The plans of all boxes and the memory behind them.
class RoiPlans {
 public:
  RoiPlans(const char* op, const RoiShape& s, const Tensor& boxes, Dtype dtype) : plans_(size_t(s.rois)) {
    const RoiBoxes all(op, s, boxes);
    host::compute_dtype(dtype) == Dtype::kDouble ? build<double>(s, all) : build<float>(s, all);
    sort_by_image(s, [&](int64_t k) { return plans_[size_t(k)].image; }, order_, image_start_);
  }

  RoiArgs args(const RoiShape& s, Dtype dtype, const void* in, void* out) const {
    int64_t widest = 0;
    for (const RoiPlan& plan : plans_) widest = std::max(widest, plan.cols.high - plan.cols.low);
    return {s, dtype, plans_.data(), order_.data(), image_start_.data(), in, out, widest, 0, 0};
  }

 private:
  template <class C>
  void build(const RoiShape& s, const RoiBoxes& boxes) {
    const int64_t bins = s.out_h + s.out_w;
    starts_.resize(size_t(s.rois * (bins + 1)));
    taps_.resize(size_t(s.rois));
    host::parallel(s.rois, bins * 128, [&](int64_t begin, int64_t end) {
      std::vector<RoiTap<C>> taps;
      for (int64_t k = begin; k < end; ++k) {
        taps.clear();
        const RoiBox box = boxes[k];
        RoiPlan& plan = plans_[size_t(k)];
        plan.image = roi_image(s, box);
        int64_t* starts = starts_.data() + k * (bins + 1);
        plan.starts = starts;
        const RoiAxis rows = roi_rows(s, box), cols = roi_columns(s, box);
        plan.undefined = roi_undefined(rows) || roi_undefined(cols);
        plan.rows = add_axis(rows, taps, starts);
        plan.cols = add_axis(cols, taps, starts + s.out_h);
        starts[bins] = int64_t(taps.size());
        std::vector<char>& kept = taps_[size_t(k)];
        kept.resize(taps.size() * sizeof(RoiTap<C>));
        std::memcpy(kept.data(), taps.data(), kept.size());
        plan.taps = kept.data();
      }
    });
  }

  template <class C>
  static RoiRange add_axis(const RoiAxis& axis, std::vector<RoiTap<C>>& taps, int64_t* starts) {
    RoiRange span{axis.length, 0};
    for (int64_t bin = 0; bin < axis.bins; ++bin) {
      starts[bin] = int64_t(taps.size());
      roi_taps(axis, bin, roi_samples(axis, bin, -1, double(axis.length)), [&](int64_t pixel, double weight) {
        span = {std::min(span.low, pixel), std::max(span.high, pixel + 1)};
        taps.push_back({pixel, C(weight)});
      });
    }
    return span;
  }

  std::vector<RoiPlan> plans_;
  std::vector<int64_t> starts_, order_, image_start_;
  std::vector<std::vector<char>> taps_;
};

}  // namespace
}  // namespace pydl

#endif
