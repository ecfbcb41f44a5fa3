// What the host and the kernels of Soft-NMS and Matrix NMS tell each other.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

inline constexpr int64_t kSoftNmsPad = 16;  // the lanes of the widest vector
inline int64_t soft_nms_room(int64_t count) { return (count + kSoftNmsPad) / kSoftNmsPad * kSoftNmsPad; }

struct SoftNmsJob {
  const void* boxes;  // [count][4]
  const void* scores;
  const int64_t* classes;  // null: all of one class
  int64_t count;
  Dtype box_dtype, score_dtype;
  bool wide;  // compute in float64
  bool gaussian;
  double iou_threshold, sigma, score_threshold;
  int64_t* indices;  // [count], results
  void* new_scores;  // [count] of score_dtype
};

// Matrix NMS; planes are over positions in order of decreasing score, padded with empty boxes.
struct MatrixNmsJob {
  const void* boxes;  // [count][4]
  const void* scores;
  const int64_t* classes;  // null: all of one class
  const int64_t* source;   // [count], the row of a position's box
  int64_t count;
  Dtype box_dtype, score_dtype;
  bool wide, gaussian;
  double sigma;
  void* planes;  // x1, y1, x2, y2, area, and the largest IoU with a box before it: of the compute type
  int64_t* sorted_classes;
  void* new_scores;  // [count] of score_dtype, in the order of the scores given
};

}  // namespace pydl
