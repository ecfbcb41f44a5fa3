// Gradient of an attention bias of any broadcast shape. A piece of work owns its part of the bias, a block of its rows
// or of its columns, and runs over everything that is broadcast; it keeps the sums and stores them once.

#include "cpu/attention_bwd_tile.h"

namespace pydl {

struct AttentionBiasBwd {
  AttentionCall call;
  void* dbias;  // [batches, heads, rows, columns] contiguous, of the bias's dtype
  int64_t batches, heads, rows, columns;
  int64_t row_blocks, column_blocks, column_tiles;  // tiles of keys in each block of columns

  int64_t owned_columns() const { return columns == 1 ? 1 : column_tiles * kTileK; }
};

namespace PYDL_ISA {
namespace {

// Adds a tile [key][query] to the sums: [column][query] where the bias has rows, else [column][lane].
template <class C>
void add_tile(const AttentionBiasBwd& f, const C* ds, int64_t keys, int64_t lanes, int64_t column, C* sums) {
  constexpr int L = kLanes<C>;
  const bool rows = f.rows > 1, columns = f.columns > 1;
  auto add = [](C* to, Vec<C> value) { store(to, load(to) + value); };
  if (rows && columns) {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = j * kTileQ; i < j * kTileQ + lanes; i += L) add(sums + column * kTileQ + i, load(ds + i));
    }
  } else if (rows) {
    for (int64_t i = 0; i < lanes; i += L) {
      Vec<C> total = {};
      for (int64_t j = 0; j < keys; ++j) total += load(ds + j * kTileQ + i);
      add(sums + i, total);
    }
  } else {
    Vec<C> all = {};
    for (int64_t j = 0; j < keys; ++j) {
      Vec<C> total = {};
      for (int64_t i = 0; i < lanes; i += L) total += load(ds + j * kTileQ + i);
      if (columns) {
        add(sums + (column + j) * L, total);
      } else {
        all += total;
      }
    }
    if (!columns) add(sums, all);
  }
}

template <class T>
void sum_block(const AttentionBiasBwd& f, const BwdScratch<compute_t<T>>& s, int64_t b, int64_t h, int64_t q_tile,
               int64_t first_tile, compute_t<T>* sums) {
  using C = compute_t<T>;
  const AttentionCall& a = f.call;
  const int64_t i0 = q_tile * kTileQ, queries = smaller(kTileQ, a.q_length - i0), shared = h / a.group;
  load_queries<T>(a, s, b, h, i0, queries);
  TileMask<C> mask;
  const TileRange tiles = tiles_of(a, b, h, q_tile);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const auto [tile, masked] = tiles[t];
    if (tile < first_tile || tile >= first_tile + f.column_tiles) continue;
    const int64_t j0 = tile * kTileK, keys = smaller(kTileK, a.k_length - j0);
    if (masked) mask.set(a.masks, b, h, i0, queries, j0);
    const Operand<C> k = operand<T>(a.k, b, shared, j0, keys, a.d, few(queries), 0, s.k);
    const Operand<C> v = operand<T>(a.v, b, shared, j0, keys, a.dv, few(queries), 0, s.v);
    gradient_tile<C>(a, s, k, v, masked ? &mask : nullptr, b, h, i0, queries, j0, keys);
    add_tile(f, s.ds, keys, lanes_of<C>(queries), j0 - first_tile * kTileK, sums);
  }
}

template <class T>
void bias_pieces(const AttentionBiasBwd& f, void* memory, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int L = kLanes<C>;
  const AttentionCall& a = f.call;
  const BwdScratch<C> scratch(a, memory);
  C* const sums = static_cast<C*>(memory) + BwdScratch<C>::elements(a);
  const int64_t width = f.rows > 1 ? kTileQ : L, owned = f.owned_columns();
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t column_block = piece % f.column_blocks, row_block = piece / f.column_blocks % f.row_blocks;
    const int64_t item = piece / (f.column_blocks * f.row_blocks), bb = item / f.heads, bh = item % f.heads;
    for (int64_t i = 0; i < owned * width; ++i) sums[i] = 0;
    auto range = [](int64_t n, int64_t own, int64_t all) { return n > 1 ? own : all; };
    for (int64_t b = range(f.batches, bb, 0), b1 = range(f.batches, bb + 1, a.batch); b < b1; ++b) {
      for (int64_t h = range(f.heads, bh, 0), h1 = range(f.heads, bh + 1, a.heads); h < h1; ++h) {
        for (int64_t q = range(f.rows, row_block, 0), q1 = range(f.rows, row_block + 1, a.q_tiles()); q < q1; ++q) {
          sum_block<T>(f, scratch, b, h, q, column_block * f.column_tiles, sums);
        }
      }
    }
    const int64_t i0 = row_block * kTileQ, j0 = column_block * owned;
    const int64_t rows = smaller(kTileQ, f.rows - i0), columns = smaller(owned, f.columns - j0);
    auto put = [&](auto tag) {
      using B = decltype(tag);
      B* out = static_cast<B*>(f.dbias) + (item * f.rows + i0) * f.columns + j0;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const C* at = sums + j * width;
          from_compute(compute_t<B>(f.rows > 1 ? at[i] : sum(load(at))), out + i * f.columns + j);
        }
      }
    };
    switch (a.bias.dtype) {
      case Dtype::kDouble:
        put(double{});
        break;
      case Dtype::kHalf:
        put(Half{});
        break;
      case Dtype::kBFloat16:
        put(BFloat16{});
        break;
      default:
        put(float{});
    }
  }
}

}  // namespace

int64_t attention_bias_bwd_scratch(const AttentionBiasBwd& f) {
  return BwdScratch<double>::elements(f.call) + f.owned_columns() * (f.rows > 1 ? kTileQ : kLanes<float>);
}

void attention_bias_bwd_pieces(const AttentionBiasBwd& f, void* memory, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(f.call.q.dtype, bias_pieces<T>(f, memory, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(int64_t, attention_bias_bwd_scratch, const AttentionBiasBwd&)
PYDL_CPU_DECLARE(void, attention_bias_bwd_pieces, const AttentionBiasBwd&, void*, int64_t, int64_t)

namespace {

constexpr int64_t kColumnTiles = 8;  // in a block of columns, so that q is not read again for each tile

Tensor attention_bias_bwd(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k,
                          const Tensor& v, const Tensor& out, const Tensor& lse, const MaybeTensor& mask,
                          const MaybeTensor& bias, const MaybeTensor& key_lengths, const MaybeTensor& key_padding,
                          const MaybeTensor& q_ids, const MaybeTensor& k_ids, const MaybeTensor& prefix,
                          const std::vector<Tensor>& map, int64_t causal, int64_t left, int64_t right, double scale,
                          double softcap, int64_t) {
  const char* const op = "attention_bias_bwd";
  STD_TORCH_CHECK(bias.has_value(), op, ": bias must be given");
  HostCall host(op, q, k, v, mask, bias, key_lengths, key_padding, q_ids, k_ids, prefix, map, causal, left, right,
                scale, softcap);
  host.put_gradients(op, Array(dout), dlse, Array(out), Array(lse));
  const AttentionCall& a = host.call;
  const Array shape(*bias);
  Output dbias = host::empty(shape.sizes, 4, shape.dtype);
  AttentionBiasBwd args{a, dbias.data, shape.sizes[0], shape.sizes[1], shape.sizes[2], shape.sizes[3], 1, 1, 1};
  const bool cut_columns = args.rows == 1 && args.columns > 1;
  args.row_blocks = args.rows > 1 ? a.q_tiles() : 1;
  args.column_tiles = cut_columns ? kColumnTiles : (a.k_tiles() > 0 ? a.k_tiles() : 1);
  args.column_blocks = cut_columns ? (a.k_tiles() + kColumnTiles - 1) / kColumnTiles : 1;
  const Dtype compute = host::compute_dtype(host.q.dtype);
  const int64_t bytes = PYDL_CPU_DISPATCH(attention_bias_bwd_scratch)(args) * host::size_of(compute);
  const int64_t pieces = shape.numel() > 0 ? args.batches * args.heads * args.row_blocks * args.column_blocks : 0;
  const int64_t work = kTileQ * (a.k_length + 1) * (a.d + a.dv);
  host::parallel(pieces, work, [&](int64_t begin, int64_t end) {
    const host::Scratch memory(bytes);
    PYDL_CPU_DISPATCH(attention_bias_bwd_pieces)(args, memory.get(), begin, end);
  });
  return std::move(dbias.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("attention_bias_bwd", TORCH_BOX(&attention_bias_bwd)); }

}  // namespace
}  // namespace pydl

#endif
