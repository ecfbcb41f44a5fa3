// The running best of a vector of windows, and where its tap's number goes.
#pragma once

#include "common/pool.h"
#include "common/vec.h"

namespace pydl {
namespace {

// Adaptive windows of two lengths over the contiguous layout: a value's place holds its column in so many bits, and a
// row of maxima takes so many elements.
inline int64_t column_bits(const PoolDim& w) {
  int64_t bits = 1;
  while ((int64_t(1) << bits) < w.in) ++bits;
  return bits;
}
inline int64_t uneven_pitch(const PoolDim& w) {
  constexpr int64_t kSlack = 16;  // lanes of the widest vector: loads and stores run over by less
  return w.in + w.kernel + 2 * kSlack;
}
inline bool uneven(const PoolShape& s) { return s.h.adaptive || s.w.adaptive; }

}  // namespace

namespace PYDL_ISA {
namespace {

// Whether v takes the place of the best so far.
template <bool NAN_SEEN, class C>
inline Mask<C> wins(Vec<C> v, Vec<C> best) {
  if constexpr (NAN_SEEN) {
    return Mask<C>(greater(v, best) | is_nan(v));
  } else {
    return greater(v, best);
  }
}

// Best value, and its tap's number if INDEX, of a vector of outputs.
template <class C, bool INDEX, bool NAN_SEEN>
struct Best {
  Vec<C> value;
  IntVec<C> tap;

  void take(Vec<C> v, IntVec<C> v_tap) {
    if constexpr (INDEX) {
      const Mask<C> mask = wins<NAN_SEEN, C>(v, value);
      value = select<C>(mask, v, value);
      tap = select<C>(mask, v_tap, tap);
    } else if constexpr (NAN_SEEN) {
      value = select<C>(wins<true, C>(v, value), v, value);
    } else {
      value = max_number(v, value);
    }
  }
};

template <class C>
inline IntVec<C> splat_int(int64_t value) {
  return splat<int_t<C>>(int_t<C>(value));
}

template <class C>
inline int64_t lanes_in(Whole) {
  return kLanes<C>;
}
template <class C>
inline int64_t lanes_in(Part part) {
  return part.n;
}

// Writes the taps of neighbouring outputs; `step` is the distance between their windows in the plane (0: same window).
template <class C, class Extent>
inline void store_indices(const PoolFwd& a, int64_t position, int64_t window, int64_t step, IntVec<C> taps,
                          Extent extent) {
  if (!a.flat) {
    store_bytes<C>(static_cast<uint8_t*>(a.indices) + position, taps, extent);
  } else {
    int64_t* out = static_cast<int64_t*>(a.indices) + position;
    for (int64_t i = 0; i < lanes_in<C>(extent); ++i) out[i] = window + i * step + a.flat_tap[taps[i]];
  }
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl
