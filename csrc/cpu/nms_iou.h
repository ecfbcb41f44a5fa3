// IoU of axis-aligned boxes in vectors, rounded step by step so that all instruction sets agree.
#pragma once

#include "common/lanes.h"
#include "common/vec_math.h"

namespace pydl::PYDL_ISA {
namespace {

// Element i of an array of any floating dtype.
template <class C>
inline C number(const void* data, Dtype dtype, int64_t i) {
  C value = 0;
  PYDL_FLOAT_SWITCH(dtype, value = C(to_compute(static_cast<const T*>(data)[i])));
  return value;
}

template <class V>
inline V area_of(V x1, V y1, V x2, V y2) {
  return rounded(rounded(x2 - x1) * rounded(y2 - y1));
}

// Sides of the common rectangle to its area; a side that is negative or NaN counts as 0.
template <class V>
inline V overlap_of(V width, V height) {
  return rounded(max_number(width, V{}) * max_number(height, V{}));
}

}  // namespace
}  // namespace pydl::PYDL_ISA
