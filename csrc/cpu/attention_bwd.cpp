// Masked attention, backward: scores recomputed from the logsumexp (Dao et al. 2022, arXiv 2205.14135), five products
// for each score that is not skipped. One thread sums dq, dk and dv of a head; where there are few heads, their blocks
// of queries are cut into parts by the shape, and dk and dv of the parts are added up in order.

#include "cpu/attention_bwd_tile.h"

namespace pydl {

struct AttentionBwd {
  AttentionCall call;
  int64_t parts;
  void* partial;  // [B, Hk, parts, Sk, padded D + padded Dv] of the compute type
  void *dq, *dk, *dv;
  AttentionRows dq_rows, dk_rows, dv_rows;  // strides
};

namespace PYDL_ISA {
namespace {

template <class T>
void bwd_block(const AttentionBwd& f, const BwdScratch<compute_t<T>>& s, int64_t b, int64_t h, int64_t q_tile,
               compute_t<T>* dk, compute_t<T>* dv) {
  using C = compute_t<T>;
  const AttentionCall& a = f.call;
  const int64_t i0 = q_tile * kTileQ, queries = smaller(kTileQ, a.q_length - i0), shared = h / a.group;
  const int64_t dp = padded_columns(a.d), dvp = padded_columns(a.dv), row = dp + dvp;
  const int64_t lanes = lanes_of<C>(queries);
  load_queries<T>(a, s, b, h, i0, queries);
  TileMask<C> mask;
  const TileRange tiles = tiles_of(a, b, h, q_tile);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const auto [tile, masked] = tiles[t];
    const int64_t j0 = tile * kTileK, keys = smaller(kTileK, a.k_length - j0);
    if (masked) mask.set(a.masks, b, h, i0, queries, j0);
    const uint64_t skip = masked ? mask.unseen & bit_range(0, keys) : 0;
    const Operand<C> k = operand<T>(a.k, b, shared, j0, keys, a.d, true, skip, s.k);
    const Operand<C> v = operand<T>(a.v, b, shared, j0, keys, a.dv, few(queries), 0, s.v);
    gradient_tile<C>(a, s, k, v, masked ? &mask : nullptr, b, h, i0, queries, j0, keys);
    if (a.softcap != 0) {
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t i = j * kTileQ; i < j * kTileQ + lanes; i += kLanes<C>) {
          const Vec<C> ds = load(s.ds + i);
          store(s.ds + i, select<C>(equal((IntVec<C>)ds, IntVec<C>{}), ds, ds * load(s.slope + i)));
        }
      }
    }
    gemm<C>({s.p, kTileQ, 1, s.dout, dvp, dv + j0 * row, row, queries, true}, keys, dvp);
    gemm<C>({s.ds, kTileQ, 1, s.q, dp, dk + j0 * row, row, queries, true}, keys, dp);
    gemm<C>({s.ds, 1, kTileQ, k.data, k.row, s.dq, dp, keys, t > 0}, queries, ceil_div(a.d, kLanes<C>) * kLanes<C>);
  }
  T* dq = static_cast<T*>(f.dq) + b * f.dq_rows.batch + h * f.dq_rows.head + i0 * f.dq_rows.row;
  for (int64_t i = 0; i < queries; ++i, dq += f.dq_rows.row) {
    sweep<C>(a.d, [&](int64_t c, int, auto extent) {
      const Vec<C> value = tiles.count > 0 ? load(s.dq + i * dp + c, extent) : Vec<C>{};
      store(dq + c, value * C(a.scale), extent);
    });
  }
}

template <class T>
void bwd_parts(const AttentionBwd& f, void* memory, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const AttentionCall& a = f.call;
  const BwdScratch<C> scratch(a, memory);
  const int64_t dp = padded_columns(a.d), row = dp + padded_columns(a.dv);
  const int64_t blocks = a.group * a.q_tiles();
  for (int64_t part = begin; part < end; ++part) {
    const int64_t unit = part / f.parts, b = unit / a.shared_heads, shared = unit % a.shared_heads;
    C* sums = static_cast<C*>(f.partial) + part * a.k_length * row;
    for (int64_t i = 0; i < a.k_length * row; ++i) sums[i] = 0;
    const int64_t own = part % f.parts, first = blocks * own / f.parts, last = blocks * (own + 1) / f.parts;
    for (int64_t block = first; block < last; ++block) {
      bwd_block<T>(f, scratch, b, shared * a.group + block / a.q_tiles(), block % a.q_tiles(), sums, sums + dp);
    }
  }
}

// Keys [begin, end) of all batch items and heads: parts are added, scaled and stored.
template <class T>
void bwd_sums(const AttentionBwd& f, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const AttentionCall& a = f.call;
  const int64_t dp = padded_columns(a.d), row = dp + padded_columns(a.dv);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t unit = at / a.k_length, j = at % a.k_length, b = unit / a.shared_heads, h = unit % a.shared_heads;
    const C* sums = static_cast<const C*>(f.partial) + (unit * f.parts * a.k_length + j) * row;
    auto put = [&](T* out, const C* from, int64_t n, C factor) {
      sweep<C>(n, [&](int64_t c, int, auto extent) {
        Vec<C> total = load(from + c, extent);
        for (int64_t part = 1; part < f.parts; ++part) total += load(from + part * a.k_length * row + c, extent);
        store(out + c, total * factor, extent);
      });
    };
    put(static_cast<T*>(f.dk) + b * f.dk_rows.batch + h * f.dk_rows.head + j * f.dk_rows.row, sums, a.d, C(a.scale));
    put(static_cast<T*>(f.dv) + b * f.dv_rows.batch + h * f.dv_rows.head + j * f.dv_rows.row, sums + dp, a.dv, C(1));
  }
}

}  // namespace

int64_t attention_bwd_scratch(const AttentionCall& a) { return BwdScratch<double>::elements(a); }

void attention_bwd_parts(const AttentionBwd& f, void* memory, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(f.call.q.dtype, bwd_parts<T>(f, memory, begin, end));
}
void attention_bwd_sums(const AttentionBwd& f, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(f.call.q.dtype, bwd_sums<T>(f, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>

namespace pydl {

PYDL_CPU_DECLARE(int64_t, attention_bwd_scratch, const AttentionCall&)
PYDL_CPU_DECLARE(void, attention_bwd_parts, const AttentionBwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, attention_bwd_sums, const AttentionBwd&, int64_t, int64_t)

namespace {

constexpr int64_t kPieces = 8;  // of work at least, so that threads have some

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q,
                                                 const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                                 const MaybeTensor& mask, const MaybeTensor& bias,
                                                 const MaybeTensor& key_lengths, const MaybeTensor& key_padding,
                                                 const MaybeTensor& q_ids, const MaybeTensor& k_ids,
                                                 const MaybeTensor& prefix, const std::vector<Tensor>& map,
                                                 int64_t causal, int64_t left, int64_t right, double scale,
                                                 double softcap, int64_t) {
  const char* const op = "attention_bwd";
  HostCall host(op, q, k, v, mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix, map, causal, left, right,
                scale, softcap);
  host.put_gradients(op, Array(dout), dlse, Array(out), Array(lse));
  const AttentionCall& a = host.call;
  const Dtype compute = host::compute_dtype(host.q.dtype);
  Output dq = empty_rows(host.q, a.d, host.q.dtype), dk = empty_rows(host.k, a.d, host.q.dtype);
  Output dv = empty_rows(host.v, a.dv, host.q.dtype);
  const int64_t units = a.batch * a.shared_heads, blocks = a.group * a.q_tiles();
  if (units > 0) {
    const int64_t parts = std::clamp<int64_t>((kPieces + units - 1) / units, 1, std::max<int64_t>(blocks, 1));
    const int64_t row = padded_columns(a.d) + padded_columns(a.dv);
    const host::Scratch partial(units * parts * a.k_length * row * host::size_of(compute));
    const AttentionBwd args{a,
                            parts,
                            partial.get(),
                            dq.data,
                            dk.data,
                            dv.data,
                            rows_of(Array(dq.tensor)),
                            rows_of(Array(dk.tensor)),
                            rows_of(Array(dv.tensor))};
    const int64_t bytes = PYDL_CPU_DISPATCH(attention_bwd_scratch)(a) * host::size_of(compute);
    const int64_t work = (blocks / parts + 1) * kTileQ * (a.k_length + 1) * (a.d + a.dv);
    host::parallel(units * parts, work, [&](int64_t begin, int64_t end) {
      const host::Scratch memory(bytes);
      PYDL_CPU_DISPATCH(attention_bwd_parts)(args, memory.get(), begin, end);
    });
    host::parallel(units * a.k_length, row * parts,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(attention_bwd_sums)(args, begin, end); });
  }
  return {std::move(dq.tensor), std::move(dk.tensor), std::move(dv.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd)); }

}  // namespace
}  // namespace pydl

#endif
