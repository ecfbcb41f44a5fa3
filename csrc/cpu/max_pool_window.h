// One pooling window: which of its taps lie inside the input, and the running best of a vector of windows.
#pragma once

#include "common/pool.h"
#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

// Taps [first, last) of output o that lie inside the input.
struct Taps {
  int64_t first, last;
};
inline Taps inner_taps(const PoolDim& d, int64_t o) {
  const int64_t start = o * d.stride - d.padding;
  const int64_t first = start < 0 ? ceil_div(-start, d.dilation) : 0;
  const int64_t last = start < d.in ? smaller(d.kernel, ceil_div(d.in - start, d.dilation)) : 0;
  return {first, larger(first, last)};
}

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
}  // namespace pydl::PYDL_ISA
