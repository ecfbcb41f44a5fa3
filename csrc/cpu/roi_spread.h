// How the columns of bins of a box weigh the columns of the map, as a dense matrix that kernels of the contiguous
// layout multiply by.
#pragma once

#include "common/vec.h"
#include "cpu/roi_plan.h"

namespace pydl {
namespace {

// Rows of bins that the contiguous layout's forward makes at once.
constexpr int kRoiRows = 8;

// Columns and bins that fit into the memory of an RoiSpread: both are rounded up to whole vectors of any kind.
inline int64_t roi_spread_width(const RoiArgs& a) { return (a.widest + 15) / 16 * 16; }
inline int64_t roi_spread_bins(const RoiArgs& a) { return (a.shape.out_w + 15) / 16 * 16; }
inline int64_t roi_spread_bytes(const RoiArgs& a) {
  const int64_t size = a.dtype == Dtype::kDouble ? 8 : 4, width = roi_spread_width(a);
  return width * (roi_spread_bins(a) + kRoiRows) * size + width * 8;
}

}  // namespace

namespace PYDL_ISA {
namespace {

// The matrix of one box. It covers `width` columns of the map from `left`, whole vectors of them: those that the box
// reads and, if there is room, others with weight 0 instead of a part of a vector.
template <class C>
struct RoiSpread {
  int64_t left, width;
  int64_t readable;  // columns up to the end of the map
  int64_t lanes;     // bins, rounded up to whole vectors
  int64_t columns;   // by_column: how many columns have a weight
  int64_t* column;   // by_column: [columns] their numbers, from left; by_bin: [vectors][2] the bins that reach a vector
  C* weights;        // by_column: [width][lanes]; by_bin: [out_w][width]
  C* sums;           // [kRoiRows][width], for the kernel's use

  RoiSpread(const RoiArgs& a, const RoiPlan& plan, void* scratch) {
    constexpr int L = kLanes<C>;
    const RoiShape& s = a.shape;
    width = ceil_div(larger(plan.cols.high - plan.cols.low, 0), L) * L;
    left = width == 0 ? 0 : width <= s.width ? smaller(plan.cols.low, s.width - width) : plan.cols.low;
    readable = smaller(width, s.width - left);
    lanes = ceil_div(s.out_w, L) * L;
    weights = static_cast<C*>(scratch);
    sums = weights + roi_spread_width(a) * roi_spread_bins(a);
    column = reinterpret_cast<int64_t*>(sums + kRoiRows * roi_spread_width(a));
    columns = 0;
  }

  void by_column(const RoiShape& s, const RoiPlan& plan) {
    clear(width * lanes);
    for (int64_t i = 0; i < width; ++i) column[i] = 0;
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      for (const RoiTap<C>& tap : taps_of<C>(plan, s.out_h + ow)) {
        column[tap.pixel - left] = 1;
        weights[(tap.pixel - left) * lanes + ow] = tap.weight;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      if (column[i] != 0) column[columns++] = i;
    }
  }

  void by_bin(const RoiShape& s, const RoiPlan& plan) {
    clear(width * s.out_w);
    for (int64_t i = 0; i < width; i += kLanes<C>) {
      column[i / kLanes<C> * 2] = s.out_w;
      column[i / kLanes<C> * 2 + 1] = 0;
    }
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      for (const RoiTap<C>& tap : taps_of<C>(plan, s.out_h + ow)) {
        weights[ow * width + tap.pixel - left] = tap.weight;
        int64_t* reached = column + (tap.pixel - left) / kLanes<C> * 2;
        reached[0] = smaller(reached[0], ow);
        reached[1] = ow + 1;
      }
    }
  }

 private:
  void clear(int64_t count) {
    sweep<C>(count, [&](int64_t i, int, auto extent) { store(weights + i, Vec<C>{}, extent); });
  }
};

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl
