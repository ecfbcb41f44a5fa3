// Greedy suppression of one segment: each box is tested against the kept boxes near it.
//
// Kept boxes are binned by their centres into a grid. Every cell and every row of cells carries the bounding rectangle
// of its boxes, which sorts out most of them; a vector of kept boxes is then tested with one product and two sums. What
// passes is decided exactly. All of that is exact greedy suppression: only pairs that cannot be suppressed are passed
// over.
#pragma once

#include "common/lanes.h"
#include "cpu/nms.h"

namespace pydl::PYDL_ISA {
namespace {

// Minus the smallest normal number: room for products that are rounded among subnormal numbers.
template <class C>
inline constexpr C kTiny = is_same<C, float> ? C(0x1p-126) : C(0x1p-1022);
template <class C>
inline constexpr C kEpsilon = is_same<C, float> ? C(0x1p-23) : C(0x1p-52);

// Rectangles in planes of their own: bounds of rows or cells, or kept boxes.
template <class C>
struct Rectangles {
  C *x1, *y1, *x2, *y2;

  void clear(int64_t n) {  // empty: nothing meets them
    for (int64_t i = 0; i < n; ++i) {
      x1[i] = y1[i] = kInfinity<C>;
      x2[i] = y2[i] = -kInfinity<C>;
    }
  }
  void grow(int64_t i, const Rectangles& from, int64_t j) {
    x1[i] = from.x1[j] < x1[i] ? from.x1[j] : x1[i];
    y1[i] = from.y1[j] < y1[i] ? from.y1[j] : y1[i];
    x2[i] = from.x2[j] > x2[i] ? from.x2[j] : x2[i];
    y2[i] = from.y2[j] > y2[i] ? from.y2[j] : y2[i];
  }
};

// A candidate box in every lane.
template <class C>
struct Probe {
  int64_t position;
  Vec<C> x1, y1, x2, y2, area;
  Vec<C> reach;                               // its share of the overlap that suppression takes at least
  Vec<C> near_x1, near_y1, near_x2, near_y2;  // what a box must touch to suppress it
};

template <class C>
struct KeptGrid {
  static constexpr int L = kLanes<C>;

  int64_t side, stride;                       // cells per row, and their distance from row to row
  C left = 0, top = 0, per_x = 0, per_y = 0;  // position of a centre in units of cells: (x - left) * per_x
  Rectangles<C> rows, cells, kept;
  C* reach;        // [slots]
  int64_t* place;  // [slots], positions of the kept boxes, -1 in lanes that are not filled
  int64_t* first;  // [cells + 1], first slot of a cell
  int64_t* used;   // [cells]

  // Cuts up scratch memory for `boxes` boxes in a grid of the given side.
  void cut(int64_t boxes, int64_t cells_per_side, char* memory) {
    side = cells_per_side;
    stride = nms_padded(side);
    const int64_t count = side * stride, slots = nms_padded(boxes) + side * side * kNmsPad;
    const auto take = [&](int64_t n, auto*& out) {
      out = reinterpret_cast<decltype(+out)>(memory);
      memory += nms_padded(n) * int64_t(sizeof(*out));
    };
    const auto take_four = [&](int64_t n, Rectangles<C>& r) {
      take(n, r.x1);
      take(n, r.y1);
      take(n, r.x2);
      take(n, r.y2);
    };
    take_four(stride, rows);
    take_four(count, cells);
    take_four(slots, kept);
    take(slots, reach);
    take(slots, place);
    take(count + 1, first);
    take(count, used);
  }

  int64_t cell_of(const Rectangles<C>& boxes, int64_t i) const {
    const auto axis = [&](C low, C high, C origin, C scale) {
      const C at = (low * C(0.5) + high * C(0.5) - origin) * scale;
      return at > 0 ? (at < C(side) ? int64_t(at) : side - 1) : 0;  // NaN, where sums overflowed, is 0
    };
    return axis(boxes.y1[i], boxes.y2[i], top, per_y) * stride + axis(boxes.x1[i], boxes.x2[i], left, per_x);
  }

  // The grid covers the mean of the centres and three mean deviations around it, so that a few boxes far away do not
  // put all others into one cell.
  template <class Live>
  void cover(const Rectangles<C>& boxes, int64_t begin, int64_t end, Live live) {
    C sum_x = 0, sum_y = 0, n = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (!live(i)) continue;
      n += 1;
      sum_x += boxes.x1[i] * C(0.5) + boxes.x2[i] * C(0.5);
      sum_y += boxes.y1[i] * C(0.5) + boxes.y2[i] * C(0.5);
    }
    const C mean_x = sum_x / n, mean_y = sum_y / n;
    C off_x = 0, off_y = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (!live(i)) continue;
      const C x = boxes.x1[i] * C(0.5) + boxes.x2[i] * C(0.5) - mean_x;
      const C y = boxes.y1[i] * C(0.5) + boxes.y2[i] * C(0.5) - mean_y;
      off_x += x < 0 ? -x : x;
      off_y += y < 0 ? -y : y;
    }
    const C reach_x = 3 * off_x / n, reach_y = 3 * off_y / n;
    left = mean_x - reach_x;
    top = mean_y - reach_y;
    per_x = C(side) / (2 * reach_x);
    per_y = C(side) / (2 * reach_y);
  }

  template <class Live>
  void build(const Rectangles<C>& boxes, int64_t begin, int64_t end, Live live) {
    if (side > 1) cover(boxes, begin, end, live);
    rows.clear(stride);
    cells.clear(side * stride);
    for (int64_t i = 0; i < side * stride; ++i) used[i] = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (live(i)) ++used[side > 1 ? cell_of(boxes, i) : 0];
    }
    first[0] = 0;
    for (int64_t i = 0; i < side * stride; ++i) {
      first[i + 1] = first[i] + nms_padded(used[i]);
      used[i] = 0;
    }
  }

  void insert(const Rectangles<C>& boxes, int64_t i, C share) {
    const int64_t cell = side > 1 ? cell_of(boxes, i) : 0, slot = first[cell] + used[cell];
    if (used[cell] % L == 0) {
      // lanes that are not filled yet suppress nothing
      const Vec<C> none = splat(C(__builtin_nan("")));
      C* const planes[] = {kept.x1, kept.y1, kept.x2, kept.y2, reach};
      for (C* plane : planes) store(plane + slot, none);
      for (int lane = 0; lane < L; ++lane) place[slot + lane] = -1;
    }
    ++used[cell];
    kept.x1[slot] = boxes.x1[i];
    kept.y1[slot] = boxes.y1[i];
    kept.x2[slot] = boxes.x2[i];
    kept.y2[slot] = boxes.y2[i];
    reach[slot] = share;
    place[slot] = i;
    cells.grow(cell, boxes, i);
    rows.grow(cell / stride, boxes, i);
  }

  // Bits of the rectangles at i, i + 1, ... that a probe may meet.
  static uint32_t near(const Rectangles<C>& r, int64_t i, const Probe<C>& p) {
    const auto apart = Mask<C>(greater(p.near_x1, load(r.x2 + i)) | greater(load(r.x1 + i), p.near_x2) |
                               greater(p.near_y1, load(r.y2 + i)) | greater(load(r.y1 + i), p.near_y2));
    return ~lane_bits<C>(apart) & ((uint32_t(1) << L) - 1);
  }

  // Whether a kept box suppresses the probe; Shape decides about those whose overlap may suffice.
  template <class Shape>
  bool suppresses(const Shape& shape, const Probe<C>& p) const {
    if (side == 1) return cell_suppresses(shape, p, 0);
    for (int64_t row = 0; row < side; row += L) {
      for (uint32_t row_bits = near(rows, row, p); row_bits != 0; row_bits &= row_bits - 1) {
        const int64_t start = (row + __builtin_ctz(row_bits)) * stride;
        for (int64_t col = 0; col < side; col += L) {
          for (uint32_t bits = near(cells, start + col, p); bits != 0; bits &= bits - 1) {
            if (cell_suppresses(shape, p, start + col + __builtin_ctz(bits))) return true;
          }
        }
      }
    }
    return false;
  }

  template <class Shape>
  bool cell_suppresses(const Shape& shape, const Probe<C>& p, int64_t cell) const {
    for (int64_t slot = first[cell], end = slot + used[cell]; slot < end; slot += L) {
      const Vec<C> width = min_number(load(kept.x2 + slot), p.x2) - max_number(load(kept.x1 + slot), p.x1);
      const Vec<C> height = min_number(load(kept.y2 + slot), p.y2) - max_number(load(kept.y1 + slot), p.y1);
      if constexpr (Shape::kEveryPair) {
        if (shape.decide(*this, p, slot, width, height, ~uint32_t(0))) return true;
      } else {
        // inter / (areas - inter) > t  is  inter > t / (1 + t) * areas; with one negative side the product is no
        // overlap
        const Vec<C> inter = max_number(width, Vec<C>{}) * height;
        const Mask<C> may = greater(inter, load(reach + slot) + p.reach);
        if (any<C>(may) && shape.decide(*this, p, slot, width, height, lane_bits<C>(may))) return true;
      }
    }
    return false;
  }
};

}  // namespace
}  // namespace pydl::PYDL_ISA
