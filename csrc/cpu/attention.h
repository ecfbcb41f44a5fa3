// What the CPU files of attention share: the arguments of a call as plain data, and on the host their checks.
//
// Scores are computed transposed, a tile of keys by a tile of queries with the queries in the lanes of vectors: maxima,
// sums and exponentials need nothing across lanes, and k and v are read in place.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

// The tiles of a map, and of every kernel here.
inline constexpr int64_t kTileQ = 128, kTileK = 64;

// A tensor [B, H, S, D] of any strides, in elements.
struct AttentionRows {
  const void* data;
  Dtype dtype;
  int64_t batch, head, row, column;
};

// Masks; a null pointer stands for one that is not there, a stride of 0 for a dimension that is shared.
struct AttentionMasks {
  const int32_t* words;  // a bit for each key
  int64_t word_batch, word_head, word_row, word_count;
  const int64_t* key_lengths;
  const uint8_t* key_padding;
  const int64_t *q_ids, *k_ids;
  const int64_t* prefix;
  bool band;                 // whether any of the three limits below is one
  int64_t low, high, below;  // i + low <= key <= i + high; key <= i + below, or before the prefix
  int64_t q_length, k_length;
};

// For each tile row, which tiles are not empty, partial ones first; and in which order rows are taken. Null without a
// map.
struct AttentionTiles {
  const int32_t *count, *list;  // of a count: all, partial, and the row that is taken at this row's place
  int64_t batch, head;          // strides of tile rows
};

struct AttentionCall {
  AttentionRows q, k, v, bias;
  AttentionMasks masks;
  AttentionTiles tiles;
  int64_t batch, heads, shared_heads, group, q_length, k_length, d, dv;
  double scale, softcap;
  // of the backward
  AttentionRows dout, out, dlse;
  const void* lse;  // [B, H, Sq] of the compute type

  int64_t q_tiles() const { return (q_length + kTileQ - 1) / kTileQ; }
  int64_t k_tiles() const { return (k_length + kTileK - 1) / kTileK; }
};

// Elements of the compute type that a row of d takes in scratch memory: whole vectors at every level.
inline constexpr int64_t padded_columns(int64_t d) { return (d + 15) / 16 * 16; }

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include "common/host.h"

namespace pydl {
namespace {

using host::Array;
using host::Output;
using host::Sizes;
using host::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline AttentionRows rows_of(const Array& a) {
  auto stride = [&](int64_t d) { return d < a.dim && a.sizes[d] != 1 ? a.strides[d] : 0; };
  return {a.data, a.dtype, stride(0), stride(1), stride(2), stride(3)};
}

// A mask given as a vector or matrix for each item of the batch, as contiguous memory of T.
template <class T>
class Vector {
 public:
  Vector(const char* op, const char* name, const MaybeTensor& given, int64_t batch, int64_t columns) {
    if (!given.has_value()) return;
    tensor_ = host::as_contiguous(*given);
    const Array a(*tensor_);
    const bool fits = a.dim == (columns < 0 ? 1 : 2) && a.sizes[0] == batch && (columns < 0 || a.sizes[1] == columns);
    STD_TORCH_CHECK(fits, op, ": ", name, " must have one entry for each of ", batch, " batch items",
                    columns < 0 ? "" : " and positions");
    if constexpr (sizeof(T) == 1) {
      STD_TORCH_CHECK(a.dtype == Dtype::kBool, op, ": ", name, " must be bool, got ", host::name_of(a.dtype));
      data_ = static_cast<const T*>(a.data);
    } else if (a.dtype == Dtype::kInt32) {
      const int32_t* values = static_cast<const int32_t*>(a.data);
      wide_.assign(values, values + a.numel());
      data_ = wide_.data();
    } else {
      STD_TORCH_CHECK(a.dtype == Dtype::kInt64, op, ": ", name, " must be int32 or int64, got ",
                      host::name_of(a.dtype));
      data_ = static_cast<const T*>(a.data);
    }
  }
  const T* get() const { return data_; }

 private:
  MaybeTensor tensor_;
  std::vector<int64_t> wide_;
  const T* data_ = nullptr;
};

// The numbers and vectors among the masks, checked; `masks` points into this object.
struct HostMasks {
  HostMasks(const char* op, const MaybeTensor& lengths_in, const MaybeTensor& padding_in, const MaybeTensor& q_ids_in,
            const MaybeTensor& k_ids_in, const MaybeTensor& prefix_in, int64_t batch, int64_t q_length,
            int64_t k_length, int64_t causal, int64_t left, int64_t right)
      : lengths(op, "key_lengths", lengths_in, batch, -1),
        padding(op, "key_padding", padding_in, batch, k_length),
        q_ids(op, "q_ids", q_ids_in, batch, q_length),
        k_ids(op, "k_ids", k_ids_in, batch, k_length),
        prefix(op, "prefix", prefix_in, batch, -1) {
    STD_TORCH_CHECK(q_ids_in.has_value() == k_ids_in.has_value(), op, ": q_ids and k_ids must be given together");
    STD_TORCH_CHECK(causal >= 0 && causal <= 2, op, ": causal must be 0, 1 or 2, got ", causal);
    constexpr int64_t kUnlimited = int64_t(1) << 40;
    const int64_t shift = k_length - q_length;
    masks = {};
    masks.key_lengths = lengths.get();
    masks.key_padding = padding.get();
    masks.q_ids = q_ids.get();
    masks.k_ids = k_ids.get();
    masks.prefix = prefix.get();
    masks.band = causal != 0 || left >= 0 || right >= 0;
    masks.low = left >= 0 ? shift - (left < kUnlimited ? left : kUnlimited) : -kUnlimited;
    masks.high = right >= 0 ? shift + (right < kUnlimited ? right : kUnlimited) : kUnlimited;
    masks.below = causal == 0 ? kUnlimited : causal == 1 ? 0 : shift;
    masks.q_length = q_length;
    masks.k_length = k_length;
  }

  Vector<int64_t> lengths;
  Vector<uint8_t> padding;
  Vector<int64_t> q_ids, k_ids, prefix;
  AttentionMasks masks;
};

// The six tensors of a map, checked against a call, and what the kernels read of them.
class HostTiles {
 public:
  HostTiles(const char* op, const std::vector<Tensor>& map, const MaybeTensor& mask, bool vectors, int64_t batch,
            int64_t heads, int64_t q_length, int64_t k_length)
      : map_(map) {
    STD_TORCH_CHECK(map.empty() || map.size() == 6, op, ": map must be six tensors or none, got ", map.size());
    STD_TORCH_CHECK(map.empty() == !(vectors || mask.has_value()), op,
                    ": masks that are tensors need the six tensors of their tile map, others none");
    if (map.empty()) return;
    for (Tensor& t : map_) t = host::as_contiguous(t);
    const int64_t nq = (q_length + kTileQ - 1) / kTileQ, nk = (k_length + kTileK - 1) / kTileK;
    const Array classes(map_[1]), count(map_[2]), list(map_[3]);
    const bool shaped = classes.dim == 4 && shared_or(classes.sizes[0], batch) && shared_or(classes.sizes[1], heads) &&
                        classes.sizes[2] == nq && classes.sizes[3] == nk;
    STD_TORCH_CHECK(shaped, op, ": map must have classes of shape [1 or B, 1 or H, ", nq, ", ", nk, "]");
    const int64_t outer = classes.sizes[0] * classes.sizes[1];
    STD_TORCH_CHECK(count.dtype == Dtype::kInt32 && count.numel() == outer * nq * 3 && list.dtype == Dtype::kInt32 &&
                        list.numel() == outer * nq * nk,
                    op, ": map must have int32 counts [.., nq, 3] and lists [.., nq, nk]");
    tiles = {static_cast<const int32_t*>(count.data), static_cast<const int32_t*>(list.data),
             classes.sizes[0] == 1 ? 0 : classes.sizes[1] * nq, classes.sizes[1] == 1 ? 0 : nq};
    for (int64_t row = 0; row < outer * nq; ++row) {
      const int32_t all = tiles.count[3 * row], partial = tiles.count[3 * row + 1];
      const int32_t taken = tiles.count[3 * row + 2];
      bool inside = 0 <= partial && partial <= all && all <= nk && 0 <= taken && taken < nq;
      for (int64_t i = 0; inside && i < all; ++i) {
        const int32_t tile = tiles.list[row * nk + i] >> 1;
        inside = 0 <= tile && tile < nk;
      }
      STD_TORCH_CHECK(inside, op, ": map names tiles beyond the ", nq, " x ", nk, " that there are");
    }
    if (!mask.has_value()) return;
    const Array given(*mask), words(map_[0]);
    const int64_t row_words = (k_length + 31) / 32;
    bool same = given.dim == 4 && words.dim == 4 && words.dtype == Dtype::kInt32 && words.sizes[3] == row_words &&
                shared_or(given.sizes[0], batch) && shared_or(given.sizes[1], heads) &&
                shared_or(given.sizes[2], q_length) && shared_or(given.sizes[3], k_length);
    for (int64_t d = 0; same && d < 3; ++d) same = words.sizes[d] == given.sizes[d];
    STD_TORCH_CHECK(same, op, ": map must have int32 words of the mask's shape, 32 keys in each");
    this->words = rows_of(words);
    word_count = row_words;
  }

  void put_words(AttentionMasks& masks) const {
    masks.words = static_cast<const int32_t*>(words.data);
    masks.word_batch = words.batch;
    masks.word_head = words.head;
    masks.word_row = words.row;
    masks.word_count = word_count;
  }

  AttentionTiles tiles = {};

 private:
  static bool shared_or(int64_t n, int64_t size) { return n == 1 || n == size; }

  std::vector<Tensor> map_;
  AttentionRows words = {};
  int64_t word_count = 0;
};

// Every argument of a forward or backward, checked.
struct HostCall {
  HostCall(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const MaybeTensor& mask,
           const MaybeTensor& bias_in, const MaybeTensor& key_lengths, const MaybeTensor& key_padding,
           const MaybeTensor& q_ids, const MaybeTensor& k_ids, const MaybeTensor& prefix,
           const std::vector<Tensor>& map, int64_t causal, int64_t left, int64_t right, double scale, double softcap)
      : q(q_in),
        k(k_in),
        v(v_in),
        host_masks(op, key_lengths, key_padding, q_ids, k_ids, prefix, size(op, q, 0), size(op, q, 2), size(op, k, 2),
                   causal, left, right),
        host_tiles(op, map, mask,
                   key_lengths.has_value() || key_padding.has_value() || q_ids.has_value() || prefix.has_value(),
                   q.sizes[0], q.sizes[1], q.sizes[2], k.sizes[2]) {
    size(op, v, 2);
    STD_TORCH_CHECK(host::is_floating(q.dtype) && k.dtype == q.dtype && v.dtype == q.dtype, op,
                    ": q, k and v must have one floating dtype");
    STD_TORCH_CHECK(k.sizes[0] == q.sizes[0] && k.sizes[3] == q.sizes[3] && v.sizes[0] == k.sizes[0] &&
                        v.sizes[1] == k.sizes[1] && v.sizes[2] == k.sizes[2],
                    op, ": q [B, H, Sq, D], k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv] must agree");
    STD_TORCH_CHECK(k.sizes[1] > 0 ? q.sizes[1] % k.sizes[1] == 0 : q.sizes[1] == 0, op,
                    ": the heads of q must be a multiple of those of k");
    call = {};
    call.q = rows_of(q);
    call.k = rows_of(k);
    call.v = rows_of(v);
    if (bias_in.has_value()) {
      const Array bias(*bias_in);
      const int64_t full[] = {q.sizes[0], q.sizes[1], q.sizes[2], k.sizes[2]};
      bool fits = bias.dim == 4 && host::is_floating(bias.dtype);
      for (int64_t d = 0; fits && d < 4; ++d) fits = bias.sizes[d] == 1 || bias.sizes[d] == full[d];
      STD_TORCH_CHECK(fits, op, ": bias must be floating and have four dimensions, each 1 or full");
      call.bias = rows_of(bias);
    }
    call.masks = host_masks.masks;
    host_tiles.put_words(call.masks);
    call.tiles = host_tiles.tiles;
    call.batch = q.sizes[0];
    call.heads = q.sizes[1];
    call.shared_heads = k.sizes[1];
    call.group = k.sizes[1] > 0 ? q.sizes[1] / k.sizes[1] : 1;
    call.q_length = q.sizes[2];
    call.k_length = k.sizes[2];
    call.d = q.sizes[3];
    call.dv = v.sizes[3];
    call.scale = scale;
    call.softcap = softcap;
  }

  // The forward's results and their gradients.
  void put_gradients(const char* op, const Array& dout, const MaybeTensor& dlse, const Array& out, const Array& lse) {
    auto like = [&](const Array& a, int64_t columns) {
      return a.dim == 4 && a.sizes[0] == q.sizes[0] && a.sizes[1] == q.sizes[1] && a.sizes[2] == q.sizes[2] &&
             a.sizes[3] == columns && a.dtype == q.dtype;
    };
    STD_TORCH_CHECK(like(dout, call.dv) && like(out, call.dv), op,
                    ": dout and out must be [B, H, Sq, Dv] in q's dtype");
    auto rows = [&](const Array& a) {
      return a.dim == 3 && a.sizes[0] == q.sizes[0] && a.sizes[1] == q.sizes[1] && a.sizes[2] == q.sizes[2] &&
             a.dtype == host::compute_dtype(q.dtype);
    };
    STD_TORCH_CHECK(rows(lse) && lse.contiguous(), op, ": lse must be [B, H, Sq] as the forward returned it");
    call.dout = rows_of(dout);
    call.out = rows_of(out);
    call.lse = lse.data;
    if (!dlse.has_value()) return;
    const Array given(*dlse);
    STD_TORCH_CHECK(rows(given), op, ": dlse must have lse's shape and dtype");
    call.dlse = rows_of(given);
  }

  static int64_t size(const char* op, const Array& a, int64_t d) {
    STD_TORCH_CHECK(a.dim == 4, op, ": q, k and v must have four dimensions, got ", a.dim);
    return a.sizes[d];
  }

  Array q, k, v;
  HostMasks host_masks;
  HostTiles host_tiles;
  AttentionCall call;
};

// New [B, H, S, columns], with heads inside of positions in memory where `like` has them there.
inline Output empty_rows(const Array& like, int64_t columns, Dtype dtype) {
  const int64_t sizes[] = {like.sizes[0], like.sizes[1], like.sizes[2], columns};
  const int64_t swapped_sizes[] = {like.sizes[0], like.sizes[2], like.sizes[1], like.sizes[3]};
  const int64_t swapped_strides[] = {like.strides[0], like.strides[2], like.strides[1], like.strides[3]};
  Array swapped = like;
  swapped.sizes = swapped_sizes;
  swapped.strides = swapped_strides;
  if (like.contiguous() || !swapped.contiguous()) return host::empty(sizes, 4, dtype);
  auto most = [](int64_t n) { return n > 1 ? n : 1; };
  const int64_t row = most(columns) * most(sizes[1]);
  const int64_t strides[] = {row * most(sizes[2]), most(columns), row, 1};
  return host::empty_strided(sizes, strides, 4, dtype);
}

}  // namespace
}  // namespace pydl

#endif
