// Boxes in SIMD lanes: from x1 y1 x2 y2 of box after box in memory to one vector for each coordinate, and back; and the
// arithmetic of box_pair.h on such vectors.
#pragma once

#include "common/box.h"
#include "common/vec_math.h"

namespace pydl::PYDL_ISA {
namespace {

// atan of t in [0, 1]: t times a polynomial in t^2 fitted at Chebyshev nodes; within 1.5 ulp.
inline VecF atan_unit(VecF t) {
  constexpr float c[] = {1.0f,          -0.333333224f,  0.199995577f,  -0.142785758f,  0.110507712f,  -0.0878504291f,
                         0.0668528154f, -0.0439284109f, 0.0219129454f, -0.0070306696f, 0.00105760747f};
  return t * polynomial(t * t, c);
}
inline VecD atan_unit(VecD t) {
  constexpr double c[] = {1.0,
                          -0.3333333333333325,
                          0.19999999999986157,
                          -0.14285714284820428,
                          0.11111111080383854,
                          -0.09090908440338843,
                          0.07692298432985685,
                          -0.06666572806289763,
                          0.05881647236717415,
                          -0.05259103789485882,
                          0.0474370596643217,
                          -0.042828645702794474,
                          0.038129809754225044,
                          -0.03264116292977077,
                          0.0259471057039563,
                          -0.018386836817918875,
                          0.011122014669752633,
                          -0.005484778971809356,
                          0.002090633535263676,
                          -0.0005727925781292097,
                          9.978410811953032e-05,
                          -8.26799581733715e-06};
  return t * polynomial(t * t, c);
}

// The arithmetic of box_pair.h on vectors of L boxes.
template <class Number>
struct VecMath {
  using C = Number;
  using V = Vec<C>;

  static inline V max(V a, V b) { return max_number(a, b); }
  static inline V min(V a, V b) { return min_number(a, b); }
  static inline Mask<C> greater(V a, V b) { return PYDL_ISA::greater(a, b); }
  static inline V select(Mask<C> mask, V yes, V no) { return PYDL_ISA::select<C>(mask, yes, no); }

  // atan(w / h); NaN for 0 / 0. The quotient is kept in [0, 1] by turning it over where it is larger.
  static inline V atan_ratio(V w, V h) {
    const V a = max_number(-w, w), b = max_number(-h, h);
    const Mask<C> wide = greater(a, b);
    const V t = atan_unit(select(wide, b, a) / select(wide, a, b));
    const V angle = select(wide, splat(C(1.57079632679489661923)) - t, t);
    const IntVec<C> sign = ((IntVec<C>)w ^ (IntVec<C>)h) & (int_t<C>(1) << (8 * sizeof(C) - 1));
    return (V)((IntVec<C>)angle | sign);
  }
};

template <class C>
using BoxVec = BoxOf<VecMath<C>>;

// How many of a chunk's elements lie in its vector k, for n boxes.
template <class C>
inline Part part_of(int64_t n, int k) {
  constexpr int64_t L = kLanes<C>;
  return {smaller(larger(4 * n - k * L, 0), L)};
}

// n boxes at p, at most as many as there are lanes; the other lanes are zero.
template <class T, class C = compute_t<T>>
inline BoxVec<C> load_boxes(const T* p, int64_t n) {
  constexpr int64_t L = kLanes<C>;
  Vec<C> a, b, c, d;
  if (n >= L) {
    a = load(p);
    b = load(p + L);
    c = load(p + 2 * L);
    d = load(p + 3 * L);
  } else {
    a = load(p, part_of<C>(n, 0));
    b = load(p + L, part_of<C>(n, 1));
    c = load(p + 2 * L, part_of<C>(n, 2));
    d = load(p + 3 * L, part_of<C>(n, 3));
  }
  const Vec<C> x_low = even(a, b), y_low = odd(a, b), x_high = even(c, d), y_high = odd(c, d);
  return {even(x_low, x_high), even(y_low, y_high), odd(x_low, x_high), odd(y_low, y_high)};
}

// One box in every lane.
template <class T, class C = compute_t<T>>
inline BoxVec<C> splat_box(const T* p) {
  return {splat(to_compute(p[0])), splat(to_compute(p[1])), splat(to_compute(p[2])), splat(to_compute(p[3]))};
}

// The first n lanes, and zero in the others.
template <class C>
inline BoxVec<C> first_lanes(const BoxVec<C>& boxes, int64_t n) {
  C index[kLanes<C>];
  for (int i = 0; i < kLanes<C>; ++i) index[i] = C(i);
  const Mask<C> kept = greater(splat(C(n)), load(index));
  const Vec<C> zero = {};
  return {select<C>(kept, boxes.x1, zero), select<C>(kept, boxes.y1, zero), select<C>(kept, boxes.x2, zero),
          select<C>(kept, boxes.y2, zero)};
}

template <class T, class C = compute_t<T>>
inline void store_boxes(T* p, const BoxVec<compute_t<T>>& boxes, int64_t n) {
  constexpr int64_t L = kLanes<C>;
  const Vec<C> x_low = interleave_low(boxes.x1, boxes.x2), x_high = interleave_high(boxes.x1, boxes.x2);
  const Vec<C> y_low = interleave_low(boxes.y1, boxes.y2), y_high = interleave_high(boxes.y1, boxes.y2);
  const Vec<C> a = interleave_low(x_low, y_low), b = interleave_high(x_low, y_low), c = interleave_low(x_high, y_high),
               d = interleave_high(x_high, y_high);
  if (n >= L) {
    store(p, a);
    store(p + L, b);
    store(p + 2 * L, c);
    store(p + 3 * L, d);
  } else {
    store(p, a, part_of<C>(n, 0));
    store(p + L, b, part_of<C>(n, 1));
    store(p + 2 * L, c, part_of<C>(n, 2));
    store(p + 3 * L, d, part_of<C>(n, 3));
  }
}

// The values of n lanes; all of them when there are so many.
template <class T>
inline Vec<compute_t<T>> load_lanes(const T* p, int64_t n) {
  return n >= kLanes<compute_t<T>> ? load(p) : load(p, Part{n});
}
template <class T>
inline void store_lanes(T* p, Vec<compute_t<T>> v, int64_t n) {
  n >= kLanes<compute_t<T>> ? store(p, v) : store(p, v, Part{n});
}

}  // namespace
}  // namespace pydl::PYDL_ISA
