// Thresholds that the caller gives in float64, for values of float32: comparisons with them stay exact.
#pragma once

#include <cmath>
#include <limits>

namespace pydl {

// The largest float not above t: x > t and x > float_below(t) are the same for every float x. NaN stays NaN.
inline float float_below(double t) {
  const float near = float(t);
  return double(near) > t ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near;
}

// The smallest float not below t: x >= t and x >= float_above(t) are the same for every float x.
inline float float_above(double t) { return -float_below(-t); }

}  // namespace pydl
