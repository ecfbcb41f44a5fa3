// Greedy suppression over the positions of a segment, by one thread or by several. A Shape says what boxes are:
//
//   Compute, kEveryPair         type of coordinates; whether boxes that do not meet may suppress each other
//   boxes                       bounding rectangles by position
//   live(i)                     whether box i can suppress or be suppressed at all
//   share(i)                    its part of the least overlap with which a pair can be suppressed
//   probe(i)                    box i as a candidate
//   decide(grid, probe, slot, width, height, lanes)    whether one of these lanes of kept boxes suppresses the probe
#pragma once

#include "cpu/nms_grid.h"

namespace pydl::PYDL_ISA {
namespace {

template <class Shape>
int64_t side_of(int64_t boxes) {
  return Shape::kEveryPair ? 1 : nms_side(boxes);
}

template <class Shape>
void settle_segment(const Shape& shape, const NmsSegment& s, uint8_t* keep, char* scratch) {
  KeptGrid<typename Shape::Compute> grid;
  grid.cut(s.end - s.begin, side_of<Shape>(s.end - s.begin), scratch);
  grid.build(shape.boxes, s.begin, s.end, [&](int64_t i) { return shape.live(i); });
  int64_t kept = 0, i = s.begin;
  for (; i < s.end && kept < s.most; ++i) {
    const bool live = shape.live(i);
    keep[i] = !(live && grid.suppresses(shape, shape.probe(i)));
    if (!keep[i]) continue;
    ++kept;
    if (live) grid.insert(shape.boxes, i, shape.share(i));
  }
  for (; i < s.end; ++i) keep[i] = 0;
}

// A segment that threads share: the grid of all boxes kept so far, and one of those kept in the block being settled.
template <class C>
struct SharedSegment {
  KeptGrid<C> grid, block;
  int64_t kept;
};

template <class Shape>
void begin_shared(const Shape& shape, const NmsSegment& s, char* scratch) {
  using C = typename Shape::Compute;
  SharedSegment<C>& shared = *reinterpret_cast<SharedSegment<C>*>(scratch);
  static_assert(sizeof(SharedSegment<C>) <= 512);
  shared.grid.cut(s.end - s.begin, side_of<Shape>(s.end - s.begin), scratch + 512);
  shared.grid.build(shape.boxes, s.begin, s.end, [&](int64_t i) { return shape.live(i); });
  shared.kept = 0;
}

// Marks those of positions [begin, end) that no box kept before this block suppresses.
template <class Shape>
void probe_shared(const Shape& shape, uint8_t* keep, int64_t begin, int64_t end, const char* scratch) {
  const auto& shared = *reinterpret_cast<const SharedSegment<typename Shape::Compute>*>(scratch);
  for (int64_t i = begin; i < end; ++i) {
    keep[i] = !(shape.live(i) && shared.grid.suppresses(shape, shape.probe(i)));
  }
}

// Settles the marked positions of a block among themselves; false when no more boxes are wanted.
template <class Shape>
bool settle_shared(const Shape& shape, const NmsSegment& s, uint8_t* keep, int64_t begin, int64_t end, char* scratch) {
  auto& shared = *reinterpret_cast<SharedSegment<typename Shape::Compute>*>(scratch);
  shared.block.cut(end - begin, side_of<Shape>(end - begin), scratch + 512 + nms_scratch(s.end - s.begin));
  const auto live = [&](int64_t i) { return keep[i] && shape.live(i); };
  shared.block.build(shape.boxes, begin, end, live);
  for (int64_t i = begin; i < end; ++i) {
    if (shared.kept == s.most) keep[i] = 0;
    const bool tested = live(i);
    if (tested && shared.block.suppresses(shape, shape.probe(i))) keep[i] = 0;
    if (!keep[i]) continue;
    ++shared.kept;
    if (!tested) continue;
    shared.block.insert(shape.boxes, i, shape.share(i));
    shared.grid.insert(shape.boxes, i, shape.share(i));
  }
  if (shared.kept < s.most) return true;
  for (int64_t i = end; i < s.end; ++i) keep[i] = 0;
  return false;
}

}  // namespace
}  // namespace pydl::PYDL_ISA
