// The tile map of a set of masks: a dense mask packed to one bit for each score, and which tiles of scores are empty,
// partial or full, in lists for both loop orders. One pass over the dense mask.

#include "cpu/attention_tile.h"

namespace pydl {

struct AttentionPack {
  const uint8_t* mask;
  int64_t heads, rows, keys;  // sizes of the mask, keys expanded
  int64_t stride_batch, stride_head, stride_row, stride_key;
  int32_t* words;
};

struct AttentionClasses {
  AttentionMasks masks;
  int64_t heads, q_tiles, k_tiles;
  uint8_t* classes;
};

namespace PYDL_ISA {

// Rows [begin, end) of all of the mask.
void attention_pack_rows(const AttentionPack& a, int64_t begin, int64_t end) {
  const int64_t words = ceil_div(a.keys, 32);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t item = row / a.rows;
    const uint8_t* in =
        a.mask + item / a.heads * a.stride_batch + item % a.heads * a.stride_head + row % a.rows * a.stride_row;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t first = w * 32, n = smaller(32, a.keys - first);
      uint32_t word = 0;
      if (a.stride_key == 1 && n == 32) {
        for (int part = 0; part < 4; ++part) {
          uint64_t eight;
          __builtin_memcpy(&eight, in + first + part * 8, 8);
          // any value but 0 is true: its highest bit, then the lowest bits of eight bytes side by side
          eight = ((eight & 0x7f7f7f7f7f7f7f7f) + 0x7f7f7f7f7f7f7f7f) | eight;
          eight = (eight >> 7) & 0x0101010101010101;
          word |= uint32_t((eight * 0x0102040810204080) >> 56) << (part * 8);
        }
      } else {
        for (int64_t j = 0; j < n; ++j) word |= uint32_t(in[(first + j) * a.stride_key] != 0) << j;
      }
      a.words[row * words + w] = int32_t(word);
    }
  }
}

// Rows [begin, end) of tiles of all batch items and heads.
void attention_class_rows(const AttentionClasses& a, int64_t begin, int64_t end) {
  uint64_t words[kTileQ];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t item = row / a.q_tiles, i0 = row % a.q_tiles * kTileQ;
    const int64_t queries = smaller(kTileQ, a.masks.q_length - i0);
    for (int64_t tile = 0; tile < a.k_tiles; ++tile) {
      allowed_words(a.masks, item / a.heads, item % a.heads, i0, queries, tile * kTileK, words);
      uint64_t all = ~uint64_t(0), some = 0;
      for (int64_t i = 0; i < queries; ++i) {
        all &= words[i];
        some |= words[i];
      }
      a.classes[row * a.k_tiles + tile] = some == 0 ? 0 : all == ~uint64_t(0) ? 2 : 1;
    }
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>
#include <numeric>

namespace pydl {

PYDL_CPU_DECLARE(void, attention_pack_rows, const AttentionPack&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, attention_class_rows, const AttentionClasses&, int64_t, int64_t)

namespace {

// Partial tiles of each row in order, then full ones; `rows` rows of n tiles at these strides.
void list_tiles(const uint8_t* classes, int64_t outer, int64_t rows, int64_t n, int64_t stride_row,
                int64_t stride_entry, int32_t* counts, int32_t* lists) {
  for (int64_t slot = 0; slot < outer * rows; ++slot) {
    const uint8_t* own = classes + slot / rows * rows * n + slot % rows * stride_row;
    int32_t* list = lists + slot * n;
    int64_t written = 0;
    for (int kind = 1; kind <= 2; ++kind) {
      for (int64_t i = 0; i < n; ++i) {
        if (own[i * stride_entry] == kind) list[written++] = int32_t(2 * i + (kind - 1));
      }
      counts[3 * slot + (kind == 1 ? 1 : 0)] = int32_t(written);
    }
    for (; written < n; ++written) list[written] = 0;
  }
}

// Rows by how many tiles they have, most first; of equal ones the last or the first.
void order_rows(int64_t outer, int64_t rows, bool last_first, int32_t* counts) {
  std::vector<int32_t> order(rows);
  for (; outer > 0; --outer, counts += 3 * rows) {
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const int32_t left = counts[3 * a], right = counts[3 * b];
      return left != right ? left > right : last_first ? a > b : a < b;
    });
    for (int64_t i = 0; i < rows; ++i) counts[3 * i + 2] = order[i];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_map(
    const MaybeTensor& mask, const MaybeTensor& key_lengths, const MaybeTensor& key_padding, const MaybeTensor& q_ids,
    const MaybeTensor& k_ids, const MaybeTensor& prefix, int64_t batch, int64_t q_length, int64_t k_length,
    int64_t causal, int64_t left, int64_t right) {
  const char* const op = "attention_map";
  STD_TORCH_CHECK(batch >= 0 && q_length >= 0 && k_length >= 0, op, ": sizes must not be negative");
  const HostMasks host(op, key_lengths, key_padding, q_ids, k_ids, prefix, batch, q_length, k_length, causal, left,
                       right);
  const bool vectors = key_lengths.has_value() || key_padding.has_value() || q_ids.has_value() || prefix.has_value();
  STD_TORCH_CHECK(vectors || mask.has_value(), op, ": a mask or a vector must be given");
  AttentionClasses args{host.masks, 1, (q_length + kTileQ - 1) / kTileQ, (k_length + kTileK - 1) / kTileK, nullptr};
  int64_t items = batch;
  const int64_t none = 0;
  Output words = host::empty(&none, 1, Dtype::kInt32);
  if (mask.has_value()) {
    const Array m(*mask);
    const int64_t full[] = {batch, m.dim == 4 ? m.sizes[1] : 0, q_length, k_length};
    bool fits = m.dim == 4 && m.dtype == Dtype::kBool;
    for (int64_t d = 0; fits && d < 4; ++d) fits = m.sizes[d] == 1 || m.sizes[d] == full[d];
    STD_TORCH_CHECK(fits, op, ": mask must be bool [1 or B, H, 1 or Sq, 1 or Sk]");
    const AttentionRows s = rows_of(m);
    const int64_t shape[] = {m.sizes[0], m.sizes[1], m.sizes[2], (k_length + 31) / 32};
    words = host::empty(shape, 4, Dtype::kInt32);
    const AttentionPack pack{
        static_cast<const uint8_t*>(m.data), shape[1], shape[2], k_length, s.batch, s.head, s.row, s.column,
        static_cast<int32_t*>(words.data)};
    host::parallel(shape[0] * shape[1] * shape[2], k_length,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(attention_pack_rows)(pack, begin, end); });
    const AttentionRows w = rows_of(Array(words.tensor));
    args.masks.words = pack.words;
    args.masks.word_batch = w.batch;
    args.masks.word_head = w.head;
    args.masks.word_row = w.row;
    args.masks.word_count = shape[3];
    args.heads = shape[1];
    if (!vectors) items = shape[0];
  }
  const int64_t nq = args.q_tiles, nk = args.k_tiles, outer = items * args.heads;
  const int64_t by_tile[] = {items, args.heads, nq, nk}, by_key[] = {items, args.heads, nk, nq};
  const int64_t q_counts[] = {items, args.heads, nq, 3}, k_counts[] = {items, args.heads, nk, 3};
  Output classes = host::empty(by_tile, 4, Dtype::kUInt8);
  Output q_count = host::empty(q_counts, 4, Dtype::kInt32), q_list = host::empty(by_tile, 4, Dtype::kInt32);
  Output k_count = host::empty(k_counts, 4, Dtype::kInt32), k_list = host::empty(by_key, 4, Dtype::kInt32);
  args.classes = static_cast<uint8_t*>(classes.data);
  host::parallel(outer * nq, nk * kTileQ * 8,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(attention_class_rows)(args, begin, end); });
  list_tiles(args.classes, outer, nq, nk, nk, 1, static_cast<int32_t*>(q_count.data),
             static_cast<int32_t*>(q_list.data));
  list_tiles(args.classes, outer, nk, nq, 1, nk, static_cast<int32_t*>(k_count.data),
             static_cast<int32_t*>(k_list.data));
  order_rows(outer, nq, true, static_cast<int32_t*>(q_count.data));
  order_rows(outer, nk, false, static_cast<int32_t*>(k_count.data));
  return {std::move(words.tensor),  std::move(classes.tensor), std::move(q_count.tensor),
          std::move(q_list.tensor), std::move(k_count.tensor), std::move(k_list.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("attention_map", TORCH_BOX(&attention_map)); }

}  // namespace
}  // namespace pydl

#endif
