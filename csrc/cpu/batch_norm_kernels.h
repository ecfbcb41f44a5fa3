// What the kernels of batch normalisation share: parameters in double, and the entry points that one file calls in
// another.
#pragma once

#include "common/vec.h"
#include "common/vec_bits.h"
#include "cpu/batch_norm.h"

namespace pydl::PYDL_ISA {

// Statistics of chunks (planes: channel * chunks + chunk) into `partial`.
void batch_norm_plane_stats(const BatchNorm& a, int64_t begin, int64_t end);
// The same of chunks of rows; the buffer holds three wide rows of the compute type.
void batch_norm_row_stats(const BatchNorm& a, void* buffer, int64_t begin, int64_t end);
// Mean and variance of channels from `partial`, and their coefficients.
void batch_norm_merge(const BatchNorm& a, int64_t begin, int64_t end);

// The means of channels [begin, end), which the sums of the backward need, into the coefficients.
void batch_norm_bwd_means(const BatchNormBwd& a, int64_t begin, int64_t end);
// Sums of chunks, numbered likewise; for rows the buffer holds two wide rows of the compute type.
void batch_norm_bwd_sums(const BatchNormBwd& a, void* buffer, int64_t begin, int64_t end);
// Sums of one chunk of `count` neighbouring channels of short planes, at most kChannelsAtOnce.
void batch_norm_bwd_short_sums(const BatchNormBwd& a, int64_t channel, int64_t count, int64_t chunk);
// dweight, dbias and the coefficients of channels, from the partial sums, from given ones, or from none.
void batch_norm_bwd_merge(const BatchNormBwd& a, int64_t begin, int64_t end);

namespace {

// Elements that are summed in vectors before their sums are added up in double.
inline constexpr int64_t kSumBlock = 2048;
// Channels that are widened at once.
inline constexpr int64_t kBlock = 64;

// Planes of so few elements that the hardware has not seen where a channel goes on when they end: several channels are
// taken at once, if all their values stay in a core's cache.
inline constexpr int64_t kChannelsAtOnce = 8;
inline bool short_planes(const Channels& s) { return !s.rows() && s.inner <= 256; }
inline int64_t channels_at_once(const Channels& s) {
  return short_planes(s) ? larger(1, smaller(kChannelsAtOnce, 65536 / s.per_channel())) : 1;
}

// The hardware follows a stream up to the end of a page; this tells it where the stream goes on.
template <class T>
inline void fetch_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096);
}

// The same of a stream that goes back.
template <class T>
inline void fetch_back(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) - 4096);
}

inline void widen_parameter(const Parameter& p, double absent, double* out, int64_t begin, int64_t n) {
  if (p.data == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = absent;
    return;
  }
  PYDL_FLOAT_SWITCH(p.dtype,
                    for (int64_t i = 0; i < n; ++i) out[i] = to_compute(static_cast<const T*>(p.data)[begin + i]));
}

// A wide row holds a channel several times.
template <class C>
inline void spread(C* table, int64_t width, int64_t channels, int64_t channel, C value) {
  for (int64_t i = channel; i < width; i += channels) table[i] = value;
}

inline bool is_finite(double value) { return value - value == 0; }

// The n values of a plane's piece, and where they begin.
struct Piece {
  int64_t offset, n, plane, start;
};
inline Piece piece_of(const Channels& s, const Cut& cut, int64_t plane, int64_t k) {
  const int64_t start = k * cut.piece;
  return {plane * s.inner + start, smaller(cut.piece, s.inner - start), plane, start};
}

// Pieces first ... last - 1 of a channel. Planes may be so small that a division for each would show.
template <class F>
inline void each_piece(const Channels& s, const Cut& cut, int64_t channel, int64_t first, int64_t last, F&& f) {
  int64_t o = cut.pieces == 1 ? first : first / cut.pieces, k = first - o * cut.pieces;
  for (int64_t item = first; item < last; ++item) {
    f(piece_of(s, cut, o * s.channels + channel, k));
    if (++k == cut.pieces) k = 0, ++o;
  }
}

// All pieces of a channel from the last to the first: what was read last is in the cache.
template <class F>
inline void each_piece_back(const Channels& s, const Cut& cut, int64_t channel, F&& f) {
  for (int64_t o = s.outer; o-- > 0;) {
    for (int64_t k = cut.pieces; k-- > 0;) f(piece_of(s, cut, o * s.channels + channel, k));
  }
}

// Pieces begin ... end - 1 of all planes as they lie in memory.
template <class F>
inline void each_plane_piece(const Channels& s, const Cut& cut, int64_t begin, int64_t end, F&& f) {
  int64_t plane = begin / cut.pieces, k = begin - plane * cut.pieces, channel = plane % s.channels;
  for (int64_t item = begin; item < end; ++item) {
    f(channel, piece_of(s, cut, plane, k));
    if (++k < cut.pieces) continue;
    k = 0;
    ++plane;
    if (++channel == s.channels) channel = 0;
  }
}

// The same from the last to the first: what the pass before read last is in the cache.
template <class F>
inline void each_plane_piece_back(const Channels& s, const Cut& cut, int64_t begin, int64_t end, F&& f) {
  int64_t plane = (end - 1) / cut.pieces, k = end - 1 - plane * cut.pieces, channel = plane % s.channels;
  for (int64_t item = end; item-- > begin;) {
    f(channel, piece_of(s, cut, plane, k));
    if (k-- > 0) continue;
    k = cut.pieces - 1;
    --plane;
    channel = (channel == 0 ? s.channels : channel) - 1;
  }
}

// The gradient behind the mask.
template <bool MASK, class T, class C, class Extent>
inline Vec<C> load_dz(const T* dy, const uint8_t* mask, int64_t i, Extent extent) {
  const Vec<C> v = load(dy + i, extent);
  if constexpr (MASK) return select<C>(mask_of<C>(load_bits<C>(mask, i, extent)), v, Vec<C>{});
  return v;
}

}  // namespace
}  // namespace pydl::PYDL_ISA
