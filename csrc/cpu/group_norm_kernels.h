// What the kernels of group normalisation share: activations, and the walk over pieces and rows.
#pragma once

#include "common/vec_math.h"
#include "cpu/batch_norm_kernels.h"
#include "cpu/group_norm.h"

namespace pydl::PYDL_ISA {

// The three coefficients of groups, or of the groups of samples, from their statistics in `stats.partial`.
void group_norm_merge(const GroupNorm& a, int64_t begin, int64_t end);

namespace {

enum Activation { kNone, kRelu, kSilu };

template <class C>
inline Vec<C> sigmoid(Vec<C> z) {
  return splat(C(1)) / (splat(C(1)) + exp<C>(-z));
}

template <Activation ACT, class C>
inline Vec<C> activate(Vec<C> z) {
  if constexpr (ACT == kRelu) return max_number(Vec<C>{}, z);  // NaN stays
  if constexpr (ACT == kSilu) return z * sigmoid<C>(z);
  return z;
}

// dy times the activation's derivative at z; relu's is 1 at NaN, as in torch.
template <Activation ACT, class C>
inline Vec<C> through(Vec<C> dy, Vec<C> z) {
  if constexpr (ACT == kRelu) {
    return select<C>(greater(z, Vec<C>{}), dy, select<C>(is_nan(z), dy, Vec<C>{}));
  } else if constexpr (ACT == kSilu) {
    const Vec<C> s = sigmoid<C>(z);
    return dy * (s * (splat(C(1)) + z * (splat(C(1)) - s)));
  } else {
    return dy;
  }
}

// Backward: the sums of the channels of sample n, of dz and then of dz * (x - mean).
template <class C>
inline C* group_sums(const GroupNorm& a, int64_t n) {
  return static_cast<C*>(a.sums) + n * 2 * a.channels;
}

// Backward, of group i of all: dx = ((dz * weight - along) - (x - mean) * slope) * rstd.
template <class C>
struct GroupCoefficients {
  C *mean, *rstd, *along, *slope;
  GroupCoefficients(const GroupNorm& a, int64_t i) {
    mean = static_cast<C*>(a.table) + i;
    rstd = mean + a.all_groups();
    along = rstd + a.all_groups();
    slope = along + a.all_groups();
  }
};

// Calls f(i, n, first, width) for groups begin ... end - 1 of all: of sample n, its channels first ... first + width
// - 1.
template <class F>
inline void each_group(const GroupNorm& a, int64_t begin, int64_t end, F&& f) {
  const int64_t width = a.group_channels();
  int64_t n = begin / a.groups, first = (begin - n * a.groups) * width;
  for (int64_t i = begin; i < end; ++i) {
    f(i, n, first, width);
    first += width;
    if (first == a.channels) first = 0, ++n;
  }
}

// Calls f(k) for the planes of a group: in the order of memory, which the hardware foresees best, unless the group is
// larger than a core's cache, where what was read last is found.
template <class F>
inline void each_plane(int64_t width, int64_t bytes, F&& f) {
  constexpr int64_t kCache = int64_t(1) << 20;
  if (bytes <= kCache) {
    for (int64_t k = 0; k < width; ++k) f(k);
  } else {
    for (int64_t k = width; k-- > 0;) f(k);
  }
}

// Calls f(plane, start, n) for pieces begin ... end - 1 of all planes, from the last to the first.
template <class F>
inline void each_piece_of_planes(int64_t inner, int64_t piece, int64_t begin, int64_t end, F&& f) {
  const int64_t pieces = (inner + piece - 1) / piece;
  int64_t plane = (end - 1) / pieces, k = end - 1 - plane * pieces;
  for (int64_t item = end; item-- > begin;) {
    f(plane, k * piece, smaller(piece, inner - k * piece));
    if (k-- == 0) k = pieces - 1, --plane;
  }
}

// Calls f(sample, first, last) for the rows of each sample among rows begin ... end - 1 of all, last sample first.
template <class F>
inline void each_sample(int64_t rows, int64_t begin, int64_t end, F&& f) {
  while (end > begin) {
    const int64_t sample = (end - 1) / rows, first = larger(begin, sample * rows);
    f(sample, first - sample * rows, end - sample * rows);
    end = first;
  }
}

// The first channels of each of `tables` rows of a table again, up to the width of a wide row.
template <class C>
inline void repeat_columns(C* columns, int64_t tables, int64_t width, int64_t channels) {
  for (int64_t t = 0; t < tables; ++t) {
    for (int64_t i = channels; i < width; ++i) columns[t * width + i] = columns[t * width + i - channels];
  }
}

// Calls f(row, rows, n) for wide rows first ... last - 1 of a sample in packs of 4 and singly, the last first.
template <class F>
inline void each_rows_back(const Cut& cut, int64_t first, int64_t last, F&& f) {
  if (last > cut.full) f(cut.full, Indices<0>{}, cut.rest);
  int64_t row = smaller(last, cut.full);
  for (; row - 4 >= first; row -= 4) f(row - 4, Indices<0, 0, 0, 0>{}, cut.width);
  while (row > first) f(--row, Indices<0>{}, cut.width);
}

}  // namespace
}  // namespace pydl::PYDL_ISA

// Calls KERNEL<ACT> of a struct of kernels.
#define PYDL_WITH_ACTIVATION(KERNEL, a, ...) \
  switch ((a).activation) {                  \
    case kRelu:                              \
      KERNEL<kRelu>(a, __VA_ARGS__);         \
      break;                                 \
    case kSilu:                              \
      KERNEL<kSilu>(a, __VA_ARGS__);         \
      break;                                 \
    default:                                 \
      KERNEL<kNone>(a, __VA_ARGS__);         \
      break;                                 \
  }
