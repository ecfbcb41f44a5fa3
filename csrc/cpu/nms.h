// What the host and the kernels of non-maximum suppression tell each other.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

// Boxes of one image and class: positions [begin, end) of the arrays below, in order of decreasing score. No more than
// `most` of them are wanted.
struct NmsSegment {
  int64_t begin, end, most;
};

// One call. Arrays are over positions: all boxes of the call, ordered by image, class and score.
struct NmsJob {
  const void* boxes;      // as the caller gave them, [rows][4] or rotated [rows][5] of `dtype`
  const int64_t* source;  // [positions], the row of a box in `boxes`
  void* x1;               // [positions] of the compute type, as the next four
  void* y1;
  void* x2;
  void* y2;
  void* area;
  void* shapes;   // [positions], rotated boxes; then x1 to y2 are their bounding rectangles in float64
  uint8_t* keep;  // [positions]
  double threshold;
  Dtype dtype;
};

// Kept boxes lie in a grid of side x side cells with room for each box of the segment. Arrays and cells are padded to
// this many elements, the lanes of the widest vector.
inline constexpr int64_t kNmsPad = 16;
inline int64_t nms_padded(int64_t n) { return (n + kNmsPad - 1) / kNmsPad * kNmsPad; }

// Few of the boxes of a cell are kept in the end, so that most cells that a box meets hold one or two vectors.
inline constexpr int64_t kNmsPerCell = 4 * kNmsPad;
inline int64_t nms_side(int64_t boxes) {
  int64_t side = 1;
  while (side < 96 && side * side * kNmsPerCell < boxes) ++side;
  return side;
}

// Bytes of scratch memory for a segment.
inline int64_t nms_scratch(int64_t boxes) {
  const int64_t side = nms_side(boxes), cells = side * nms_padded(side);
  const int64_t slots = nms_padded(boxes) + side * side * kNmsPad;
  return 1024 + 8 * (4 * (nms_padded(side) + cells) + 2 * (cells + kNmsPad) + 6 * slots);
}

// Where several threads share a segment, it is settled in blocks that grow with what is settled: few starts of threads,
// and little that one thread alone has to do.
inline int64_t nms_block(int64_t settled) { return settled > 4096 ? settled / 2 : 2048; }

}  // namespace pydl
