// One tile of the backward: probabilities recomputed from the logsumexp, and the gradient of the scores.
#pragma once

#include "cpu/attention_tile.h"

namespace pydl::PYDL_ISA {
namespace {

// Scratch of one thread: q and dout as rows and transposed, k and v, and four tiles or sums.
template <class C>
struct BwdScratch {
  BwdScratch(const AttentionCall& a, void* memory) {
    const int64_t dp = padded_columns(a.d), dvp = padded_columns(a.dv);
    C* next = static_cast<C*>(memory);
    auto take = [&](int64_t n) {
      C* start = next;
      next += n;
      return start;
    };
    q = take(kTileQ * dp);
    qt = take(dp * kTileQ);
    dout = take(kTileQ * dvp);
    dot = take(dvp * kTileQ);
    k = take(kTileK * dp);
    v = take(kTileK * dvp);
    p = take(kTileK * kTileQ);
    ds = take(kTileK * kTileQ);
    slope = take(kTileK * kTileQ);
    dq = take(kTileQ * dp);
    lse = take(kTileQ);
    delta = take(kTileQ);
  }
  static int64_t elements(const AttentionCall& a) {
    const int64_t dp = padded_columns(a.d), dvp = padded_columns(a.dv);
    return kTileQ * (3 * dp + 2 * dvp + 2) + kTileK * (dp + dvp + 3 * kTileQ);
  }
  C *q, *qt, *dout, *dot, *k, *v, *p, *ds, *slope, *dq, *lse, *delta;
};

// A block of queries: q and dout both ways, the logsumexp, and
// delta = sum over columns of dout * out, minus the gradient of the logsumexp.
template <class T>
void load_queries(const AttentionCall& a, const BwdScratch<compute_t<T>>& s, int64_t b, int64_t h, int64_t i0,
                  int64_t queries) {
  using C = compute_t<T>;
  const int64_t dp = padded_columns(a.d), dvp = padded_columns(a.dv);
  const C* lse = static_cast<const C*>(a.lse) + (b * a.heads + h) * a.q_length + i0;
  copy_rows<T>(a.out, b, h, i0, queries, a.dv, dvp, s.dot);  // for delta alone
  copy_rows<T>(a.dout, b, h, i0, queries, a.dv, dvp, s.dout);
  copy_rows<T>(a.q, b, h, i0, queries, a.d, dp, s.q);
  const C* dlse = static_cast<const C*>(a.dlse.data);
  for (int64_t i = 0; i < kTileQ; ++i) {
    C delta = 0;
    const bool sees = i < queries && lse[i] != -kInfinity<C>;
    if (sees) {
      Vec<C> sums = {};
      for (int64_t c = 0; c < dvp; c += kLanes<C>) sums += load(s.dout + i * dvp + c) * load(s.dot + i * dvp + c);
      delta = sum(sums);
      if (dlse != nullptr) delta -= dlse[b * a.dlse.batch + h * a.dlse.head + (i0 + i) * a.dlse.row];
    } else if (i < queries) {
      // a query that sees nothing may hold anything
      for (int64_t c = 0; c < dp; ++c) s.q[i * dp + c] = 0;
      for (int64_t c = 0; c < dvp; ++c) s.dout[i * dvp + c] = 0;
    }
    s.lse[i] = sees ? lse[i] : kInfinity<C>;
    s.delta[i] = delta;
  }
  arrange_queries(s.q, dp, queries, a.d, C(a.scale), s.qt);
  arrange_queries(s.dout, dvp, queries, a.dv, C(1), s.dot);
}

// p[key][query], and in ds the gradient of the scores with their bias; both are 0 where masked.
template <class C>
void gradient_tile(const AttentionCall& a, const BwdScratch<C>& s, const Operand<C>& k, const Operand<C>& v,
                   const TileMask<C>* mask, int64_t b, int64_t h, int64_t i0, int64_t queries, int64_t j0,
                   int64_t keys) {
  tile_scores<C>(a, b, h, i0, queries, j0, keys, k, s.qt, s.p, a.softcap != 0 ? s.slope : nullptr);
  row_products<C>(v, keys, s.dot, queries, a.dv, s.ds);
  for (int64_t i = 0; i < lanes_of<C>(queries); i += kLanes<C>) {
    const Vec<C> lse = load(s.lse + i), delta = load(s.delta + i), least = splat(-kInfinity<C>);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kTileQ + i;
      const Vec<C> score = load(s.p + at);
      Vec<C> p = exp_of<C>(score - lse);
      Vec<C> ds = p * (load(s.ds + at) - delta);
      if (mask != nullptr) {
        const Mask<C> ok = mask->of(j, i);
        p = select<C>(ok, p, Vec<C>{});
        ds = select<C>(ok, ds, Vec<C>{});
      }
      if (a.bias.data != nullptr) {  // -inf masks
        const Mask<C> ok = greater(score, least);
        ds = select<C>(ok, ds, select<C>(is_nan(score), ds, Vec<C>{}));
      }
      store(s.p + at, p);
      store(s.ds + at, ds);
    }
  }
}

}  // namespace
}  // namespace pydl::PYDL_ISA
