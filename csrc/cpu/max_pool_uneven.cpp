// Max pooling over adaptive windows of two lengths, forward, contiguous layout: the rows of a window are compared
// first, whole vectors of columns at a time, then its columns. Windows of up to 2 p columns are two windows of p = 2^j,
// and those come of two windows of p / 2 (the sparse table of a range-maximum query), so no pass knows which columns
// are outputs. Of equal maxima the first in row-major order wins, and of several NaN the last, whatever the order in
// which they are compared: every value carries its place.

#include "cpu/max_pool_window.h"

namespace pydl::PYDL_ISA {
namespace {

inline Mask<float> less(Vec<int32_t> a, Vec<int32_t> b) {
#if PYDL_VEC_BYTES == 64
  return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b);
#else
  return a < b;
#endif
}
inline Mask<double> less(Vec<int64_t> a, Vec<int64_t> b) {
#if PYDL_VEC_BYTES == 64
  return _mm512_cmplt_epi64_mask((__m512i)a, (__m512i)b);
#else
  return a < b;
#endif
}
template <class C>
inline Mask<C> same(Vec<C> a, Vec<C> b) {
#if PYDL_VEC_BYTES == 64
  if constexpr (sizeof(C) == 4) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
  } else {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
  }
#else
  return a == b;
#endif
}

// A vector of values and their places: row of the window << shift | column of the input.
template <class C, bool INDEX, bool NAN_SEEN>
struct Placed {
  Vec<C> value;
  IntVec<C> place;

  // Takes b in where it is the larger one, or the one whose place counts among equals.
  void take(const Placed& b) {
    if constexpr (!INDEX) {
      Best<C, false, NAN_SEEN> best{value, place};
      best.take(b.value, b.place);
      value = best.value;
      return;
    }
    Mask<C> mask = Mask<C>(greater(b.value, value) | (same<C>(b.value, value) & less(b.place, place)));
    if constexpr (NAN_SEEN) {
      const Mask<C> old = is_nan(value), last = Mask<C>(less(place, b.place));
      mask = Mask<C>(mask | (is_nan(b.value) & (last | ~old)));
    }
    value = select<C>(mask, b.value, value);
    place = select<C>(mask, b.place, place);
  }
};

// The columns of an output, and where its maximum is found.
struct Pick {
  int64_t first, last, at;
};

// One thread's buffers, with room for a vector and the longest window past the end.
template <class C>
struct LineBuffers {
  Pick* picks;       // [out]
  C* values;         // [2][pitch]
  int_t<C>* places;  // [2][pitch]
};

template <class C, bool INDEX, bool NAN_SEEN>
inline Placed<C, INDEX, NAN_SEEN> load_placed(const LineBuffers<C>& b, int64_t i) {
  IntVec<C> place = {};
  if constexpr (INDEX) place = load_raw(b.places + i, Whole{}, place);
  return {load(b.values + i), place};
}

// values[to + i] = the larger of values[i] and values[i + step], for n columns.
template <bool INDEX, bool NAN_SEEN, class C>
void join_columns(const LineBuffers<C>& b, int64_t n, int64_t step, int64_t to) {
  for (int64_t i = 0; i < n; i += kLanes<C>) {
    auto best = load_placed<C, INDEX, NAN_SEEN>(b, i);
    best.take(load_placed<C, INDEX, NAN_SEEN>(b, i + step));
    store(b.values + to + i, best.value);
    if constexpr (INDEX) store_raw(b.places + to + i, best.place, Whole{});
  }
}

// Compares the rows of a window, at every column; true if there is a NaN.
template <bool INDEX, class T, class C>
bool join_rows(const PoolFwd& a, const LineBuffers<C>& b, const T* x, int64_t rows) {
  const int64_t n = a.shape.w.in, bits = column_bits(a.shape.w);
  Mask<C> nan = {};
  IntVec<C> lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = i;
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> fill = splat(-kInfinity<C>);
    Vec<C> first = load(x + i, extent, fill);
    nan |= is_nan(first);
    Best<C, INDEX, true> best{first, splat_int<C>(0)};
    for (int64_t row = 1; row < rows; ++row) {
      const Vec<C> v = load(x + row * n + i, extent, fill);
      nan |= is_nan(v);
      best.take(v, splat_int<C>(row << bits));
    }
    store(b.values + i, best.value);
    if constexpr (INDEX) store_raw(b.places + i, best.tap + lane + splat_int<C>(i), Whole{});
  });
  return any<C>(nan);
}

// The maxima of windows of `length` columns at every column and, if two, of one more behind them.
template <bool INDEX, bool NAN_SEEN, class C>
void join_windows(const LineBuffers<C>& b, int64_t n, int64_t pitch, int64_t length, bool two) {
  int64_t part = 1;
  for (; 2 * part <= length; part *= 2) join_columns<INDEX, NAN_SEEN>(b, n, part, 0);
  if (two) join_columns<INDEX, NAN_SEEN>(b, n, length + 1 - part, pitch);
  if (part < length) join_columns<INDEX, NAN_SEEN>(b, n, length - part, 0);
}

// The number of the lane that holds the maximum.
template <bool INDEX, class C>
int best_lane(const C* value, const int_t<C>* place) {
  int best = 0;
  for (int i = 1; i < kLanes<C>; ++i) {
    const bool nan = value[i] != value[i], old = value[best] != value[best];
    const bool later = INDEX && place[i] > place[best], earlier = INDEX && place[i] < place[best];
    const bool wins = nan ? !old || later : value[i] > value[best] || (value[i] == value[best] && earlier);
    best = wins ? i : best;
  }
  return best;
}

// The maxima of long windows, one by one, behind the columns.
template <bool INDEX, bool NAN_SEEN, class C>
void join_long_windows(const LineBuffers<C>& b, int64_t out, int64_t pitch) {
  for (int64_t o = 0; o < out; ++o) {
    const Pick& p = b.picks[o];
    auto best = load_placed<C, INDEX, NAN_SEEN>(b, p.first);
    for (int64_t i = p.first + kLanes<C>; i < p.last; i += kLanes<C>) {
      best.take(load_placed<C, INDEX, NAN_SEEN>(b, smaller(i, p.last - kLanes<C>)));
    }
    C value[kLanes<C>];
    int_t<C> place[kLanes<C>];
    store(value, best.value);
    store_raw(place, best.place, Whole{});
    const int lane = best_lane<INDEX>(value, place);
    b.values[pitch + o] = value[lane];
    if (INDEX) b.places[pitch + o] = place[lane];
  }
}

template <bool INDEX, class T, class C>
void write_row(const PoolFwd& a, const LineBuffers<C>& b, int64_t position, int64_t top) {
  const PoolDim& w = a.shape.w;
  const int64_t bits = column_bits(w), columns = (int64_t(1) << bits) - 1;
  T* y = static_cast<T*>(a.y) + position;
  for (int64_t o = 0; o < w.out; ++o) from_compute(b.values[b.picks[o].at], y + o);
  for (int64_t o = 0; INDEX && o < w.out; ++o) {
    const int64_t place = b.places[b.picks[o].at], row = place >> bits, column = place & columns;
    if (a.flat) {
      static_cast<int64_t*>(a.indices)[position + o] = (top + row) * w.in + column;
    } else {
      static_cast<uint8_t*>(a.indices)[position + o] = uint8_t(row * w.kernel + column - b.picks[o].first);
    }
  }
}

// Items are output rows of planes.
template <bool INDEX, class T, class C>
void uneven_rows(const PoolFwd& a, void* scratch, int64_t begin, int64_t end) {
  const PoolDim &h = a.shape.h, &w = a.shape.w;
  const int64_t pitch = uneven_pitch(w), length = ceil_div(w.in, w.out);
  const bool wide = length >= 64;  // every column's window would cost more than the outputs'
  LineBuffers<C> b;
  b.picks = static_cast<Pick*>(scratch);
  b.values = reinterpret_cast<C*>(b.picks + w.out);
  b.places = reinterpret_cast<int_t<C>*>(b.values + 2 * pitch);
  bool two = false;
  for (int64_t o = 0; o < w.out; ++o) {
    const Span<int64_t> columns = inputs_of(w, o);
    const bool longer = columns.last - columns.first > length;
    b.picks[o] = {columns.first, columns.last, wide ? pitch + o : columns.first + (longer ? pitch : 0)};
    two |= longer;
  }
  for (int64_t i = 0; i < 2 * pitch; ++i) {
    b.values[i] = 0;
    b.places[i] = 0;
  }
  const auto join = [&]<bool NAN_SEEN>() {
    wide ? join_long_windows<INDEX, NAN_SEEN>(b, w.out, pitch)
         : join_windows<INDEX, NAN_SEEN>(b, w.in, pitch, length, two);
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / h.out;
    const Span<int64_t> rows = inputs_of(h, item - plane * h.out);
    const T* x = static_cast<const T*>(a.x) + (plane * h.in + rows.first) * w.in;
    const bool nan_seen = join_rows<INDEX>(a, b, x, rows.last - rows.first);
    nan_seen ? join.template operator()<true>() : join.template operator()<false>();
    write_row<INDEX, T>(a, b, item * w.out, rows.first);
  }
}

}  // namespace

// Output rows [begin, end) of the contiguous layout with adaptive windows of one depth.
void max_pool_uneven(const PoolFwd& a, void* scratch, int64_t begin, int64_t end) {
  if (a.indices == nullptr) {
    PYDL_FLOAT_SWITCH(a.dtype, uneven_rows<false, T, compute_t<T>>(a, scratch, begin, end));
  } else {
    PYDL_FLOAT_SWITCH(a.dtype, uneven_rows<true, T, compute_t<T>>(a, scratch, begin, end));
  }
}

}  // namespace pydl::PYDL_ISA
