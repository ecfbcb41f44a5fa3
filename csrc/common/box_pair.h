// How well two axis-aligned boxes agree, and the derivative: one text for both languages. A box is x1, y1, x2, y2.
//
//   IoU   = I / U                      I: area of the intersection, U: of the union
//   GIoU  = IoU - (H - U) / H          H: area of the smallest box around both (Rezatofighi et al., CVPR 2019)
//   DIoU  = IoU - d^2 / c^2            d: distance of the centres, c: diagonal of that box (Zheng et al., AAAI 2020)
//   CIoU  = DIoU - a v                 v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2, a = v / (1 - IoU + v), a
//   constant
//
// The type M names the arithmetic: M::C is a number, M::V one number or a vector of them, and M has max, min, greater,
// select and atan_ratio. PAIRED is the form of the losses, which add eps to every denominator; the pairwise form adds
// it to c^2 and to the denominator of a, and takes sizes of the surrounding box as at least 0.
//
// A NaN coordinate makes the box's area NaN, and with it every result: max and min need not keep NaN.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__) || defined(PYDL_SIMT)
#include "common/device.h"
#define PYDL_BOX_FN __device__ __forceinline__
#define PYDL_BOX_NAMESPACE pydl
#else
#include "common/isa.h"
#define PYDL_BOX_FN inline __attribute__((always_inline))
#define PYDL_BOX_NAMESPACE pydl::PYDL_ISA
#endif

namespace pydl {
enum BoxKind : int64_t { kIou = 0, kGeneralizedIou = 1, kDistanceIou = 2, kCompleteIou = 3 };
}  // namespace pydl

namespace PYDL_BOX_NAMESPACE {
namespace {

template <class M>
struct BoxOf {
  typename M::V x1, y1, x2, y2;
};

// A box and what each of its pairs asks for.
template <class M>
struct SizedBox {
  typename M::V x1, y1, x2, y2, area, angle;
};

template <class C>
constexpr C kSmallestNormal = C(sizeof(C) == 4 ? 0x1p-126 : 0x1p-1022);

template <class M, int KIND, bool PAIRED>
PYDL_BOX_FN SizedBox<M> sized_box(const BoxOf<M>& b) {
  using V = typename M::V;
  V w = b.x2 - b.x1, h = b.y2 - b.y1;
  SizedBox<M> sized{b.x1, b.y1, b.x2, b.y2, w * h, V{}};
  if constexpr (KIND == kCompleteIou) {
    sized.angle = M::atan_ratio(w, h);
    if constexpr (PAIRED) {  // a loss must stay finite: a box without extent has no proportions, its angle counts as 0
      V least = V{} + kSmallestNormal<typename M::C>;
      sized.angle = M::select(M::greater(least, M::max(w, -w) + M::max(h, -h)), V{}, sized.angle);
    }
  }
  return sized;
}

template <class M>
PYDL_BOX_FN typename M::V at_least_zero(typename M::V v) {
  return M::max(typename M::V{}, v);
}

template <class M, int KIND, bool PAIRED>
PYDL_BOX_FN typename M::V box_agreement(const SizedBox<M>& a, const SizedBox<M>& b, typename M::C eps) {
  using V = typename M::V;
  using C = typename M::C;
  V w = at_least_zero<M>(M::min(a.x2, b.x2) - M::max(a.x1, b.x1));
  V h = at_least_zero<M>(M::min(a.y2, b.y2) - M::max(a.y1, b.y1));
  V inter = w * h, uni = a.area + b.area - inter;
  const C in_union = PAIRED ? eps : C(0);
  V iou = inter / (uni + in_union);
  if constexpr (KIND == kIou) return iou;
  V hull_w = M::max(a.x2, b.x2) - M::min(a.x1, b.x1), hull_h = M::max(a.y2, b.y2) - M::min(a.y1, b.y1);
  if constexpr (!PAIRED) {
    hull_w = at_least_zero<M>(hull_w);
    hull_h = at_least_zero<M>(hull_h);
  }
  if constexpr (KIND == kGeneralizedIou) {
    V hull = hull_w * hull_h;
    return iou - (hull - uni) / (hull + in_union);
  }
  V dx = (a.x1 + a.x2) * C(0.5) - (b.x1 + b.x2) * C(0.5), dy = (a.y1 + a.y2) * C(0.5) - (b.y1 + b.y2) * C(0.5);
  V value = iou - (dx * dx + dy * dy) / (hull_w * hull_w + hull_h * hull_h + eps);
  if constexpr (KIND == kCompleteIou) {
    V turn = a.angle - b.angle, v = turn * turn * C(0.40528473456935108578);
    value = value - v * v / (C(1) - iou + v + eps);
  }
  return value;
}

// 1 where a is larger, 0 where b is, one half where they are equal: how torch shares the gradient of a maximum.
template <class M>
PYDL_BOX_FN typename M::V share_of_max(typename M::V a, typename M::V b) {
  using V = typename M::V;
  V one = V{} + typename M::C(1), half = V{} + typename M::C(0.5);
  return M::select(M::greater(a, b), one, M::select(M::greater(b, a), V{}, half));
}

// Along one axis: the ends of two boxes, and the gradients of the quantities made of them.
template <class M>
struct BoxAxis {
  typename M::V inter, hull, centres, size_a, size_b;

  PYDL_BOX_FN void ends(typename M::V a1, typename M::V a2, typename M::V b1, typename M::V b2, typename M::V& da1,
                        typename M::V& da2, typename M::V& db1, typename M::V& db2) const {
    using V = typename M::V;
    using C = typename M::C;
    V first = share_of_max<M>(a1, b1), last = share_of_max<M>(b2, a2), half = centres * C(0.5);
    V not_first = C(1) - first, not_last = C(1) - last;
    da1 = half - size_a - inter * first - hull * not_first;
    db1 = -half - size_b - inter * not_first - hull * first;
    da2 = half + size_a + inter * last + hull * not_last;
    db2 = size_b - half + inter * not_last + hull * last;
  }
};

// 1 / x, and 0 where that would overflow.
template <class M>
PYDL_BOX_FN typename M::V reciprocal_or_zero(typename M::V x) {
  using C = typename M::C;
  return M::select(M::greater(x, typename M::V{} + kSmallestNormal<C>), C(1) / x, typename M::V{});
}

// Gradients of g * box_agreement(a, b). The overlap of a side counts while it is positive, in the pairwise form also
// where it is 0.
template <class M, int KIND, bool PAIRED>
PYDL_BOX_FN void box_agreement_grad(const SizedBox<M>& a, const SizedBox<M>& b, typename M::C eps, typename M::V g,
                                    BoxOf<M>& da, BoxOf<M>& db) {
  using V = typename M::V;
  using C = typename M::C;
  const V zero{};
  V w = M::min(a.x2, b.x2) - M::max(a.x1, b.x1), h = M::min(a.y2, b.y2) - M::max(a.y1, b.y1);
  V w0 = at_least_zero<M>(w), h0 = at_least_zero<M>(h);
  V inter = w0 * h0, uni = a.area + b.area - inter;
  const C in_union = PAIRED ? eps : C(0);
  V per_union = C(1) / (uni + in_union), iou = inter * per_union;
  V g_union = -g * iou * per_union;
  BoxAxis<M> x{zero, zero, zero, zero, zero}, y = x;
  V hull_w = M::max(a.x2, b.x2) - M::min(a.x1, b.x1), hull_h = M::max(a.y2, b.y2) - M::min(a.y1, b.y1);
  auto hull_gradient = [&](V to_w, V to_h) {
    x.hull = PAIRED ? to_w : M::select(M::greater(zero, hull_w), zero, to_w);
    y.hull = PAIRED ? to_h : M::select(M::greater(zero, hull_h), zero, to_h);
  };
  V size_w = PAIRED ? hull_w : at_least_zero<M>(hull_w), size_h = PAIRED ? hull_h : at_least_zero<M>(hull_h);
  if constexpr (KIND == kGeneralizedIou) {
    V per_hull = C(1) / (size_w * size_h + in_union);
    g_union = g_union + g * per_hull;
    V g_hull = -g * ((uni + in_union) * per_hull) * per_hull;
    hull_gradient(g_hull * size_h, g_hull * size_w);
  }
  if constexpr (KIND == kDistanceIou || KIND == kCompleteIou) {
    V dx = (a.x1 + a.x2) * C(0.5) - (b.x1 + b.x2) * C(0.5), dy = (a.y1 + a.y2) * C(0.5) - (b.y1 + b.y2) * C(0.5);
    V per_diagonal = C(1) / (size_w * size_w + size_h * size_h + eps);
    V outer = C(2) * g * per_diagonal, apart = (dx * dx + dy * dy) * per_diagonal;
    x.centres = -outer * dx;
    y.centres = -outer * dy;
    hull_gradient(outer * apart * size_w, outer * apart * size_h);
  }
  V wa = a.x2 - a.x1, ha = a.y2 - a.y1, wb = b.x2 - b.x1, hb = b.y2 - b.y1;
  x.size_a = g_union * ha;
  y.size_a = g_union * wa;
  x.size_b = g_union * hb;
  y.size_b = g_union * wb;
  if constexpr (KIND == kCompleteIou) {
    V turn = a.angle - b.angle, v = turn * turn * C(0.40528473456935108578);
    V g_angle = -g * (v / (C(1) - iou + v + eps)) * turn * C(0.81056946913870217155);
    V turn_a = g_angle * reciprocal_or_zero<M>(wa * wa + ha * ha);
    V turn_b = -g_angle * reciprocal_or_zero<M>(wb * wb + hb * hb);
    x.size_a = x.size_a + turn_a * ha;
    y.size_a = y.size_a - turn_a * wa;
    x.size_b = x.size_b + turn_b * hb;
    y.size_b = y.size_b - turn_b * wb;
  }
  V g_inter = g * per_union - g_union;
  if constexpr (PAIRED) {
    x.inter = M::select(M::greater(w, zero), g_inter * h0, zero);
    y.inter = M::select(M::greater(h, zero), g_inter * w0, zero);
  } else {
    x.inter = M::select(M::greater(zero, w), zero, g_inter * h0);
    y.inter = M::select(M::greater(zero, h), zero, g_inter * w0);
  }
  x.ends(a.x1, a.x2, b.x1, b.x2, da.x1, da.x2, db.x1, db.x2);
  y.ends(a.y1, a.y2, b.y1, b.y2, da.y1, da.y2, db.y1, db.y2);
}

}  // namespace
}  // namespace PYDL_BOX_NAMESPACE
