// One tile of attention: rows as matrices of the compute type, which scores are allowed, and the scores.
#pragma once

#include "common/vec_math.h"
#include "cpu/attention.h"
#include "cpu/attention_gemm.h"

namespace pydl::PYDL_ISA {
namespace {

// Bits [from, to) of a word.
inline uint64_t bit_range(int64_t from, int64_t to) {
  from = larger(from, 0);
  to = smaller(to, 64);
  if (from >= to) return 0;
  return (to - from == 64 ? ~uint64_t(0) : (uint64_t(1) << (to - from)) - 1) << from;
}

// Which of 64 keys from j0 on the queries i0.. may see: a word for each query, a bit for each key.
inline void allowed_words(const AttentionMasks& m, int64_t b, int64_t h, int64_t i0, int64_t queries, int64_t j0,
                          uint64_t* out) {
  const int64_t keys = smaller(kTileK, m.k_length - j0);
  auto inside = [&](int64_t length) { return smaller(larger(length, 0), m.k_length) - j0; };
  uint64_t shared = bit_range(0, m.key_lengths != nullptr ? inside(m.key_lengths[b]) : keys);
  if (m.key_padding != nullptr) {
    const uint8_t* padding = m.key_padding + b * m.k_length + j0;
    uint64_t word = 0;
    for (int64_t j = 0; j < keys; ++j) word |= uint64_t(padding[j] != 0) << j;
    shared &= word;
  }
  for (int64_t i = 0; i < queries; ++i) out[i] = shared;
  if (m.band) {
    const int64_t before = m.prefix != nullptr ? inside(m.prefix[b]) : -1;
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t own = i0 + i - j0;
      out[i] &= bit_range(own + m.low, own + m.high + 1) & (bit_range(0, own + m.below + 1) | bit_range(0, before));
    }
  }
  if (m.words != nullptr) {
    const int32_t* word = m.words + b * m.word_batch + h * m.word_head + i0 * m.word_row + j0 / 32;
    const bool two = j0 / 32 + 1 < m.word_count;
    for (int64_t i = 0; i < queries; ++i, word += m.word_row) {
      out[i] &= uint64_t(uint32_t(word[0])) | (two ? uint64_t(uint32_t(word[1])) << 32 : 0);
    }
  }
  if (m.q_ids != nullptr) {
    const int64_t *q = m.q_ids + b * m.q_length + i0, *k = m.k_ids + b * m.k_length + j0;
    // most tiles of packed sequences hold keys of few of them: one comparison for each stretch of equal numbers
    uint64_t same[kTileQ] = {};
    for (int64_t j = 0, next; j < keys; j = next) {
      for (next = j + 1; next < keys && k[next] == k[j];) ++next;
      const uint64_t stretch = bit_range(j, next);
      for (int64_t i = 0; i < queries; ++i) same[i] |= q[i] == k[j] ? stretch : 0;
    }
    for (int64_t i = 0; i < queries; ++i) out[i] &= same[i];
  }
}

// Rows [first, first + n) of t as [n][stride] of C, columns past d are 0; rows whose bit in `skip` is set become 0.
template <class T>
void copy_rows(const AttentionRows& t, int64_t b, int64_t h, int64_t first, int64_t n, int64_t d, int64_t stride,
               compute_t<T>* out, uint64_t skip = 0) {
  using C = compute_t<T>;
  const T* in = static_cast<const T*>(t.data) + b * t.batch + h * t.head + first * t.row;
  for (int64_t i = 0; i < n; ++i, in += t.row, out += stride) {
    if (skip >> i & 1) {
      for (int64_t c = 0; c < stride; ++c) out[c] = 0;
      continue;
    }
    if (t.column == 1) {
      sweep<C>(d, [&](int64_t c, int, auto extent) { store(out + c, load(in + c, extent), extent); });
    } else {
      for (int64_t c = 0; c < d; ++c) out[c] = to_compute(in[c * t.column]);
    }
    for (int64_t c = d; c < stride; ++c) out[c] = 0;
  }
}

// A tile of k or v as an operand: in memory where its elements are C already, else copied.
template <class C>
struct Operand {
  const C* data;
  int64_t row, column;
};

// `whole`: rows must be whole vectors at unit stride. `skip` as in copy_rows.
template <class T>
Operand<compute_t<T>> operand(const AttentionRows& t, int64_t b, int64_t h, int64_t first, int64_t n, int64_t d,
                              bool whole, uint64_t skip, compute_t<T>* buffer) {
  using C = compute_t<T>;
  if constexpr (is_same<T, C>) {
    if (skip == 0 && !(whole && (t.column != 1 || d % kLanes<C> != 0))) {
      return {static_cast<const C*>(t.data) + b * t.batch + h * t.head + first * t.row, t.row, t.column};
    }
  }
  const int64_t stride = padded_columns(d);
  copy_rows<T>(t, b, h, first, n, d, stride, buffer, skip);
  return {buffer, stride, 1};
}

// Lanes that a block of queries takes: whole vectors, of the kTileQ that there is room for.
template <class C>
inline int64_t lanes_of(int64_t queries) {
  return ceil_div(queries, kLanes<C>) * kLanes<C>;
}

// Whether queries are so few that their products with keys are taken one by one, along rows instead of in lanes.
inline bool few(int64_t queries) { return queries <= 2; }

// Queries as row_products reads them: out[d][kTileQ] = factor * rows, transposed, lanes past n are 0; or, of few,
// out[n][stride].
template <class C>
void arrange_queries(const C* rows, int64_t stride, int64_t n, int64_t d, C factor, C* out) {
  if (few(n)) {
    for (int64_t i = 0; i < n * stride; i += kLanes<C>) store(out + i, load(rows + i) * factor);
    return;
  }
  constexpr int64_t block = 16;  // so that what is written stays in the first cache
  const int64_t lanes = lanes_of<C>(n);
  for (int64_t c0 = 0; c0 < d; c0 += block) {
    const int64_t c1 = smaller(c0 + block, d);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = c0; c < c1; ++c) out[c * kTileQ + i] = rows[i * stride + c] * factor;
    }
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t i = n; i < lanes; ++i) out[c * kTileQ + i] = 0;
    }
  }
}

// out[key][query] = key . query over d columns; the rows of few are whole vectors.
template <class C>
void row_products(const Operand<C>& keys, int64_t n, const C* queries, int64_t count, int64_t d, C* out) {
  if (!few(count)) {
    gemm<C>({keys.data, keys.row, keys.column, queries, kTileQ, out, kTileQ, d, false}, n, lanes_of<C>(count));
    return;
  }
  const int64_t dp = padded_columns(d), columns = ceil_div(d, kLanes<C>) * kLanes<C>;
  for (int64_t j = 0; j < n; ++j) {
    const C* key = keys.data + j * keys.row;
    Vec<C> lanes = {};
    for (int64_t i = 0; i < count; ++i) {
      Vec<C> sums = {};
      for (int64_t c = 0; c < columns; c += kLanes<C>) sums += load(key + c) * load(queries + i * dp + c);
      lanes[i] = sum(sums);
    }
    store(out + j * kTileQ, lanes);
  }
}

// One truth value per lane: whether bit j of the lane's word is set. Words are as wide as C.
template <class C>
inline Mask<C> bit_set(const int_t<C>* words, int j) {
  const IntVec<C> bit = splat(int_t<C>(int_t<C>(1) << j));
  return equal(load_raw(words, Whole{}, bit) & bit, bit);
}

// The allowed words of a tile by lanes of C, and which keys no query sees.
template <class C>
struct TileMask {
  alignas(64) int_t<C> words[sizeof(C) == 4 ? 2 : 1][kTileQ];
  uint64_t unseen;

  void set(const AttentionMasks& m, int64_t b, int64_t h, int64_t i0, int64_t queries, int64_t j0) {
    uint64_t rows[kTileQ], seen = 0;
    allowed_words(m, b, h, i0, queries, j0, rows);
    for (int64_t i = 0, lanes = lanes_of<C>(queries); i < lanes; ++i) {
      const uint64_t row = i < queries ? rows[i] : 0;
      seen |= row;
      if constexpr (sizeof(C) == 4) {
        words[0][i] = int32_t(uint32_t(row));
        words[1][i] = int32_t(uint32_t(row >> 32));
      } else {
        words[0][i] = int64_t(row);
      }
    }
    unseen = ~seen;
  }
  // Of lanes i.. for key j.
  Mask<C> of(int64_t j, int64_t i) const {
    if constexpr (sizeof(C) == 4) {
      return bit_set<C>(words[j / 32] + i, int(j % 32));
    } else {
      return bit_set<C>(words[0] + i, int(j));
    }
  }
};

// tanh: a continued fraction where the exponential would lose the digits of small values.
inline VecF tanh(VecF x) {
  const VecF limit = splat(10.0f);
  const VecF inside = min_number(limit, max_number(-limit, x));
  const VecF s = inside * inside;
  const VecF small = inside * (135135.0f + s * (17325.0f + s * (378.0f + s))) /
                     (135135.0f + s * (62370.0f + s * (3150.0f + s * 28.0f)));
  const VecF large = 1.0f - 2.0f / (exp<float>(2.0f * inside) + 1.0f);
  return select<float>(greater(splat(0.36f), s), small, large);
}
inline VecD tanh(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// The scores of a tile, transposed: s[key][query]; with a softcap also its slope.
template <class C>
void tile_scores(const AttentionCall& a, int64_t b, int64_t h, int64_t i0, int64_t queries, int64_t j0, int64_t keys,
                 const Operand<C>& k, const C* qt, C* s, C* slope) {
  row_products<C>(k, keys, qt, queries, a.d, s);
  if (a.softcap != 0) {
    const Vec<C> cap = splat(C(a.softcap)), inverse = splat(C(1 / a.softcap));
    const int64_t lanes = lanes_of<C>(queries);
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = j * kTileQ; i < j * kTileQ + lanes; i += kLanes<C>) {
        const Vec<C> t = tanh(load(s + i) * inverse);
        store(s + i, t * cap);
        if (slope != nullptr) store(slope + i, C(1) - t * t);
      }
    }
  }
  if (a.bias.data == nullptr) return;
  auto add_bias = [&](auto tag) {
    using T = decltype(tag);
    const AttentionRows& bias = a.bias;
    const T* base =
        static_cast<const T*>(bias.data) + b * bias.batch + h * bias.head + i0 * bias.row + j0 * bias.column;
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t j = 0; j < keys; ++j) {
        const C value = C(to_compute(base[i * bias.row + j * bias.column]));
        C& score = s[j * kTileQ + i];
        score = value == -kInfinity<C> ? value : score + value;
      }
    }
  };
  PYDL_FLOAT_SWITCH(a.bias.dtype, add_bias(T{}));
}

// e^x through 2^x; x is a difference of scores, so that the product's rounding is relative to what matters.
template <class C>
inline Vec<C> exp_of(Vec<C> x) {
  return exp2<C>(x * C(1.4426950408889634074));
}

// The block of queries at a place of its head: by the map, the longest and the shortest that are left in turns, so that
// threads, each of which gets a stretch of places, get equal work.
inline int64_t block_at(const AttentionCall& a, int64_t b, int64_t h, int64_t place) {
  if (a.tiles.list == nullptr) return place;
  const int64_t row = b * a.tiles.batch + h * a.tiles.head;
  return a.tiles.count[3 * (row + (place % 2 == 0 ? place / 2 : a.q_tiles() - 1 - place / 2)) + 2];
}

// The tiles that a block of queries sees, by the map or by the band alone.
struct TileRange {
  const int32_t* list;
  int64_t count, partial;     // of a list
  int64_t begin, full, rest;  // of a band: [begin, full) and [rest, count) are partial

  struct Tile {
    int64_t index;
    bool masked;
  };
  Tile operator[](int64_t t) const {
    if (list != nullptr) return {list[t] >> 1, t < partial};
    const int64_t index = begin + t;
    return {index, index < full || index >= rest};
  }
};

inline TileRange tiles_of(const AttentionCall& a, int64_t b, int64_t h, int64_t q_tile) {
  const int64_t k_tiles = a.k_tiles();
  if (a.tiles.list != nullptr) {
    const int64_t row = b * a.tiles.batch + h * a.tiles.head + q_tile;
    return {a.tiles.list + row * k_tiles, a.tiles.count[3 * row], a.tiles.count[3 * row + 1], 0, 0, 0};
  }
  const AttentionMasks& m = a.masks;
  const int64_t start = q_tile * kTileQ, last = smaller(start + kTileQ, a.q_length) - 1;
  const int64_t reach = smaller(m.high, m.below);
  auto clamp = [&](int64_t key) { return smaller(larger(key, 0), a.k_length); };
  const int64_t begin = clamp(start + m.low) / kTileK;
  const int64_t end = larger(ceil_div(clamp(last + reach + 1), kTileK), begin);
  const int64_t full = smaller(larger(ceil_div(clamp(last + m.low), kTileK), begin), end);
  const int64_t covered = clamp(start + reach + 1);
  const int64_t rest = larger(smaller(covered == a.k_length ? end : covered / kTileK, end), full);
  return {nullptr, end - begin, 0, begin, full, rest};
}

}  // namespace
}  // namespace pydl::PYDL_ISA
