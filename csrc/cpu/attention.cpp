// Masked attention, forward: online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over the tiles of keys that
// 128 queries see (tiling: Dao et al. 2022, arXiv 2205.14135). Per tile 4 D operations for each score and some twenty
// for its exponential; k and v come from the caches again for each block of queries.

#include "cpu/attention_tile.h"

namespace pydl {

struct AttentionFwd {
  AttentionCall call;
  void *out, *lse;
  int64_t out_batch, out_head, out_row;
};

namespace PYDL_ISA {
namespace {

// Scratch of one thread, in this order: transposed q, scores, k, v, sums.
template <class C>
struct FwdScratch {
  FwdScratch(const AttentionCall& a, void* memory)
      : qt(static_cast<C*>(memory)),
        scores(qt + padded_columns(a.d) * kTileQ),
        k(scores + kTileK * kTileQ),
        v(k + kTileK * padded_columns(a.d)),
        sums(v + kTileK * padded_columns(a.dv)) {}
  C *qt, *scores, *k, *v, *sums;
};

// Scores become probabilities relative to the new maximum `top`; `keep` is what earlier sums are worth then. Returns
// whether any of them changes.
template <class C>
bool softmax_tile(C* s, int64_t keys, int64_t lanes, const TileMask<C>* mask, C* top, C* total, C* keep) {
  bool changed = false;
  for (int64_t i = 0; i < lanes; i += kLanes<C>) {
    const Vec<C> least = splat(-kInfinity<C>), before = load(top + i);
    Vec<C> maxima[2] = {before, before};
    for (int64_t j = 0; j < keys; ++j) {
      Vec<C> score = load(s + j * kTileQ + i);
      if (mask != nullptr) {
        score = select<C>(mask->of(j, i), score, least);
        store(s + j * kTileQ + i, score);
      }
      maxima[j & 1] = max_number(score, maxima[j & 1]);
    }
    const Vec<C> higher = max_number(maxima[0], maxima[1]);
    const Vec<C> base = select<C>(greater(higher, least), higher, Vec<C>{});
    Vec<C> sums[2] = {};
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<C> p = exp_of<C>(load(s + j * kTileQ + i) - base);
      store(s + j * kTileQ + i, p);
      sums[j & 1] += p;
    }
    const Vec<C> factor = exp_of<C>(before - base);
    changed |= any<C>(greater(splat(C(1)), factor));
    store(keep + i, factor);
    store(total + i, load(total + i) * factor + (sums[0] + sums[1]));
    store(top + i, higher);
  }
  return changed;
}

template <class T>
void fwd_tile(const AttentionFwd& f, const FwdScratch<compute_t<T>>& scratch, int64_t b, int64_t h, int64_t q_tile) {
  using C = compute_t<T>;
  const AttentionCall& a = f.call;
  const int64_t i0 = q_tile * kTileQ, queries = smaller(kTileQ, a.q_length - i0), shared = h / a.group;
  const int64_t dp = padded_columns(a.d), dvp = padded_columns(a.dv), lanes = lanes_of<C>(queries);
  copy_rows<T>(a.q, b, h, i0, queries, a.d, dp, scratch.sums);
  arrange_queries(scratch.sums, dp, queries, a.d, C(a.scale), scratch.qt);
  alignas(64) C top[kTileQ], total[kTileQ], keep[kTileQ];
  for (int64_t i = 0; i < kTileQ; ++i) {
    top[i] = -kInfinity<C>;
    total[i] = 0;
  }
  TileMask<C> mask;
  const TileRange tiles = tiles_of(a, b, h, q_tile);
  bool started = false;
  for (int64_t t = 0; t < tiles.count; ++t) {
    const auto [tile, masked] = tiles[t];
    const int64_t j0 = tile * kTileK, keys = smaller(kTileK, a.k_length - j0);
    if (masked) mask.set(a.masks, b, h, i0, queries, j0);
    const Operand<C> k = operand<T>(a.k, b, shared, j0, keys, a.d, few(queries), 0, scratch.k);
    tile_scores<C>(a, b, h, i0, queries, j0, keys, k, scratch.qt, scratch.scores, nullptr);
    const bool changed = softmax_tile(scratch.scores, keys, lanes, masked ? &mask : nullptr, top, total, keep);
    if (started && changed) {
      for (int64_t i = 0; i < queries; ++i) {
        C* row = scratch.sums + i * dvp;
        for (int64_t c = 0; c < dvp; c += kLanes<C>) store(row + c, load(row + c) * keep[i]);
      }
    }
    // what no query here sees may be NaN, and 0 times it too
    const uint64_t skip = masked ? mask.unseen & bit_range(0, keys) : 0;
    const Operand<C> v = operand<T>(a.v, b, shared, j0, keys, a.dv, true, skip, scratch.v);
    gemm<C>({scratch.scores, 1, kTileQ, v.data, v.row, scratch.sums, dvp, keys, started}, queries,
            ceil_div(a.dv, kLanes<C>) * kLanes<C>);
    started = true;
  }
  T* out = static_cast<T*>(f.out) + b * f.out_batch + h * f.out_head + i0 * f.out_row;
  C* lse = static_cast<C*>(const_cast<void*>(f.lse)) + (b * a.heads + h) * a.q_length + i0;
  for (int64_t i = 0; i < queries; ++i) {
    const bool empty = total[i] == 0;
    const Vec<C> factor = splat(empty ? C(0) : C(1) / total[i]);
    const C* row = scratch.sums + i * dvp;
    sweep<C>(a.dv, [&](int64_t c, int, auto extent) {
      const Vec<C> sum = empty ? Vec<C>{} : load(row + c, extent);
      store(out + i * f.out_row + c, sum * factor, extent);
    });
  }
  sweep<C>(queries, [&](int64_t i, int, auto extent) {
    const Vec<C> rest = log2<C>(load(total + i, extent)) * C(0.69314718055994530942);
    store(lse + i, load(top + i, extent) + rest, extent);
  });
}

}  // namespace

// Elements of the compute type that one thread needs.
int64_t attention_fwd_scratch(const AttentionCall& a) {
  const int64_t dp = padded_columns(a.d), dvp = padded_columns(a.dv);
  return dp * kTileQ + kTileK * (kTileQ + dp + dvp) + kTileQ * larger(dp, dvp);
}

// Blocks of queries [begin, end) of all batch items and heads; batch items, whose lengths differ, take turns.
void attention_fwd_tiles(const AttentionFwd& f, void* memory, int64_t begin, int64_t end) {
  const int64_t blocks = f.call.q_tiles();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t item = block / blocks, b = item % f.call.batch, h = item / f.call.batch;
    const int64_t q_tile = block_at(f.call, b, h, block % blocks);
    PYDL_FLOAT_SWITCH(f.call.q.dtype, fwd_tile<T>(f, FwdScratch<compute_t<T>>(f.call, memory), b, h, q_tile));
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

namespace pydl {

PYDL_CPU_DECLARE(int64_t, attention_fwd_scratch, const AttentionCall&)
PYDL_CPU_DECLARE(void, attention_fwd_tiles, const AttentionFwd&, void*, int64_t, int64_t)

namespace {

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
                                         const MaybeTensor& bias, const MaybeTensor& key_lengths,
                                         const MaybeTensor& key_padding, const MaybeTensor& q_ids,
                                         const MaybeTensor& k_ids, const MaybeTensor& prefix,
                                         const std::vector<Tensor>& map, int64_t causal, int64_t left, int64_t right,
                                         double scale, double softcap, int64_t) {
  const HostCall host("attention_fwd", q, k, v, mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix, map, causal,
                      left, right, scale, softcap);
  const AttentionCall& a = host.call;
  Output out = empty_rows(host.q, a.dv, host.q.dtype);
  Output lse = host::empty(host.q.sizes, 3, host::compute_dtype(host.q.dtype));
  const AttentionRows rows = rows_of(Array(out.tensor));
  const AttentionFwd args{a, out.data, lse.data, rows.batch, rows.head, rows.row};
  const int64_t bytes = PYDL_CPU_DISPATCH(attention_fwd_scratch)(a) * host::size_of(host::compute_dtype(host.q.dtype));
  const int64_t work = std::min(kTileQ, a.q_length) * (a.k_length + 1) * (a.d + a.dv);
  host::parallel(a.batch * a.heads * a.q_tiles(), work, [&](int64_t begin, int64_t end) {
    const host::Scratch memory(bytes);
    PYDL_CPU_DISPATCH(attention_fwd_tiles)(args, memory.get(), begin, end);
  });
  return {std::move(out.tensor), std::move(lse.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd)); }

}  // namespace
}  // namespace pydl

#endif
