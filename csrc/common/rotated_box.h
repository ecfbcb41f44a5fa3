// Rotated boxes and the area they have in common, in float64, for CPU and GPU.
//
// The intersection is an integral (Green's theorem): in the frame of box a, whose points have |x| <= w / 2 and
// |y| <= h / 2, the area of box b inside is the sum over b's edges of the integral of y, cut off at +-h / 2, over the
// part of the edge with |x| <= w / 2. Each term is continuous in the corners, so that edges which coincide, touch or
// are nearly parallel need no tolerance, and there is no polygon to keep.
#pragma once

#if defined(__CUDACC__)
#define PYDL_ANYWHERE __device__
#else
#define PYDL_ANYWHERE
#endif

namespace pydl {
namespace {

struct RotatedBox {
  double x, y, width, height;
  double cosine, sine;
  double half_x, half_y;  // of the bounding rectangle
};

// A number above it would lose its degrees in float64, and has no sine.
constexpr double kLargestAngle = 1e12;

// Multiples of 90 degrees give 0 and 1 exactly.
PYDL_ANYWHERE inline void sine_of_degrees(double degrees, double& sine, double& cosine) {
  constexpr double magic = 0x1.8p52;  // adding and subtracting it rounds to an integer
  const double quarters = (degrees / 90.0 + magic) - magic;
  const double x = (degrees - 90.0 * quarters) * 0.017453292519943295769, z = x * x;
  // Taylor's series: |x| <= pi / 4
  double s = -1.0 / 355687428096000.0, c = 1.0 / 20922789888000.0;
  s = s * -z + 1.0 / 1307674368000.0;
  s = 1.0 / 6227020800.0 - z * s;
  s = 1.0 / 39916800.0 - z * s;
  s = 1.0 / 362880.0 - z * s;
  s = 1.0 / 5040.0 - z * s;
  s = 1.0 / 120.0 - z * s;
  s = 1.0 / 6.0 - z * s;
  s = x - x * z * s;
  c = 1.0 / 87178291200.0 - z * c;
  c = 1.0 / 479001600.0 - z * c;
  c = 1.0 / 3628800.0 - z * c;
  c = 1.0 / 40320.0 - z * c;
  c = 1.0 / 720.0 - z * c;
  c = 1.0 / 24.0 - z * c;
  c = 0.5 - z * c;
  c = 1.0 - z * c;
  const double fours = (quarters / 4.0 - 0.375 + magic) - magic, turn = quarters - 4.0 * fours;  // 0, 1, 2, 3
  sine = turn == 0.0 ? s : turn == 1.0 ? c : turn == 2.0 ? -s : -c;
  cosine = turn == 0.0 ? c : turn == 1.0 ? -s : turn == 2.0 ? -c : s;
}

// Without an area or with a number that is not finite, the box has bounds of NaN and meets nothing.
PYDL_ANYWHERE inline RotatedBox rotated_box(double x, double y, double width, double height, double degrees) {
  const double nan = __builtin_nan("");
  const bool usable = width > 0 && height > 0 && width * height < __builtin_inf() && x - x == 0 && y - y == 0 &&
                      degrees > -kLargestAngle && degrees < kLargestAngle;
  RotatedBox box{x, y, width, height, nan, nan, nan, nan};
  if (!usable) return box;
  sine_of_degrees(degrees, box.sine, box.cosine);
  const double c = box.cosine < 0 ? -box.cosine : box.cosine, s = box.sine < 0 ? -box.sine : box.sine;
  box.half_x = (width * c + height * s) * 0.5;
  box.half_y = (width * s + height * c) * 0.5;
  return box;
}

PYDL_ANYWHERE inline bool bounds_meet(const RotatedBox& a, const RotatedBox& b) {
  const double dx = a.x < b.x ? b.x - a.x : a.x - b.x, dy = a.y < b.y ? b.y - a.y : a.y - b.y;
  return dx < a.half_x + b.half_x && dy < a.half_y + b.half_y;
}

PYDL_ANYWHERE inline double clamped(double value, double limit) {
  return value < -limit ? -limit : value > limit ? limit : value;
}

PYDL_ANYWHERE inline double inverse(double value) {
  const double size = value < 0 ? -value : value;
  return size > 1e-290 ? 1.0 / value : 0.0;
}

PYDL_ANYWHERE inline double fraction(double part, double inverse_of_whole) {
  const double f = part * inverse_of_whole;
  return f < 0 ? 0.0 : f > 1 ? 1.0 : f;
}

// The integral of y, cut off at +-half_height, along the edge from (x0, y0) to (x1, y1) where |x| <= half_width.
PYDL_ANYWHERE inline double strip_below_edge(double x0, double y0, double x1, double y1, double half_width,
                                             double half_height) {
  const double from = clamped(x0, half_width), to = clamped(x1, half_width), per_x = inverse(x1 - x0);
  const double start = y0 + fraction(from - x0, per_x) * (y1 - y0), end = y0 + fraction(to - x0, per_x) * (y1 - y0);
  const double low = clamped(start, half_height), high = clamped(end, half_height), per_y = inverse(end - start);
  // constant before `enters`, linear, constant after `leaves`
  const double enters = fraction(low - start, per_y), leaves = fraction(high - start, per_y);
  return (to - from) * (enters * low + (leaves - enters) * 0.5 * (low + high) + (1.0 - leaves) * high);
}

PYDL_ANYWHERE inline double common_area(const RotatedBox& a, const RotatedBox& b) {
  const double dx = b.x - a.x, dy = b.y - a.y;
  // b in the frame of a; the sides of a box point along (cos, -sin) and (sin, cos)
  const double x = dx * a.cosine - dy * a.sine, y = dx * a.sine + dy * a.cosine;
  const double c = b.cosine * a.cosine + b.sine * a.sine, s = b.cosine * a.sine - b.sine * a.cosine;
  double px = 0.5 * b.width * c, py = 0.5 * b.width * s, qx = -0.5 * b.height * s, qy = 0.5 * b.height * c;
  double area = 0, x0 = x + px + qx, y0 = y + py + qy;
  // not unrolled: four edges at once would take more registers than a thread has
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (int edge = 0; edge < 4; ++edge) {
    if (edge % 2 == 0) {
      px = -px;
      py = -py;
    } else {
      qx = -qx;
      qy = -qy;
    }
    const double x1 = x + px + qx, y1 = y + py + qy;
    area += strip_below_edge(x0, y0, x1, y1, 0.5 * a.width, 0.5 * a.height);
    x0 = x1;
    y0 = y1;
  }
  const double area_a = a.width * a.height, area_b = b.width * b.height, most = area_a < area_b ? area_a : area_b;
  const double size = area < 0 ? -area : area;
  return size > most ? most : size;  // NaN, where coordinates overflow, stays
}

// Boxes whose bounding rectangles do not meet have nothing in common.
PYDL_ANYWHERE inline double rotated_iou(const RotatedBox& a, const RotatedBox& b) {
  const double common = bounds_meet(a, b) ? common_area(a, b) : 0.0;
  return common / (a.width * a.height + b.width * b.height - common);
}

}  // namespace
}  // namespace pydl
