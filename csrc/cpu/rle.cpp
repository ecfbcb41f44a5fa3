// Run-length codes of masks and label maps in column-major order, and COCO's text form of the counts.
//
// Encoding never transposes: rows are compared with the row above, 64 columns at a time. A first pass counts the runs
// that start in each column, so that a second knows where each column's starts belong. Decoding writes, at each start,
// the value XOR the one before it, and then adds up the rows by XOR.
#include "common/dtype.h"
#include "common/isa.h"
#include "common/vec.h"

namespace pydl {

// [batch, height, width] planes of T, or of masks: bytes that count as 0 or not 0.
struct RlePlanes {
  const void* data;
  int64_t batch, height, width;
  int64_t bytes;  // of an element: 1, 4 or 8
  bool mask;
};

// The runs of one plane.
struct RleRuns {
  const void* values;  // of T; null: 0, 1, 0, 1, ...
  const int64_t* counts;
  int64_t runs, height, width;
  int64_t bytes;
};

constexpr int64_t kBlock = 64;  // columns compared at once

namespace PYDL_ISA {
namespace {

template <class T, bool MASK>
bool starts_run(T value, T before) {
  return MASK ? (value != 0) != (before != 0) : value != before;
}

// Which of n elements differ from their neighbours.
template <class T, bool MASK>
void compare(const T* here, const T* before, int64_t n, uint8_t* __restrict starts) {
  for (int64_t c = 0; c < n; ++c) starts[c] = starts_run<T, MASK>(here[c], before[c]);
}

// One block of a plane.
template <class T>
struct Block {
  const T* plane;
  int64_t height, width, first, columns, item;
};

template <class T>
Block<T> block_of(const RlePlanes& p, int64_t item) {
  const int64_t blocks = ceil_div(p.width, kBlock), first = item % blocks * kBlock;
  const T* plane = static_cast<const T*>(p.data) + item / blocks * p.height * p.width;
  return {plane, p.height, p.width, first, smaller(kBlock, p.width - first), item / blocks * p.width + first};
}

// Calls f(row, starts) for the rows in which a run starts, with one byte for each column. The row above row 0 is the
// last row, one column to the left; before the first element a mask is 0, and no label is.
template <class T, bool MASK, class F>
void each_row(const Block<T>& b, F&& f) {
  uint8_t starts[kBlock] = {};
  const T *top = b.plane + b.first, *left = top + (b.height - 1) * b.width - 1;
  starts[0] = b.first > 0 ? starts_run<T, MASK>(top[0], left[0]) : !MASK || top[0] != 0;
  compare<T, MASK>(top + 1, left + 1, b.columns - 1, starts + 1);
  f(0, starts);
  for (int64_t row = 1; row < b.height; ++row) {
    const T* here = top + row * b.width;
    compare<T, MASK>(here, here - b.width, b.columns == kBlock ? kBlock : b.columns, starts);
    uint64_t words[kBlock / 8], any = 0;
    __builtin_memcpy(words, starts, kBlock);
    for (uint64_t word : words) any |= word;
    if (any != 0) f(row, starts);
  }
}

// How many runs start in each column: counts [batch, width].
template <class T, bool MASK>
void count_blocks(const RlePlanes& p, int64_t* counts, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Block<T> block = block_of<T>(p, item);
    uint32_t total[kBlock] = {};
    each_row<T, MASK>(block, [&](int64_t, const uint8_t* starts) {
      for (int64_t c = 0; c < kBlock; ++c) total[c] += starts[c];
    });
    for (int64_t c = 0; c < block.columns; ++c) counts[block.item + c] = total[c];
  }
}

// Where runs start, counted down the columns; `places` [batch, width] says where each column's starts belong.
template <class T, bool MASK>
void write_blocks(const RlePlanes& p, const int64_t* places, int64_t* starts_out, T* values, int64_t begin,
                  int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Block<T> block = block_of<T>(p, item);
    int64_t next[kBlock];
    for (int64_t c = 0; c < block.columns; ++c) next[c] = places[block.item + c];
    each_row<T, MASK>(block, [&](int64_t row, const uint8_t* starts) {
      for (int64_t word = 0; word < kBlock; word += 8) {
        uint64_t left;
        __builtin_memcpy(&left, starts + word, 8);
        for (; left != 0; left &= left - 1) {
          const int64_t c = word + __builtin_ctzll(left) / 8, at = next[c]++;
          starts_out[at] = (block.first + c) * p.height + row;
          if constexpr (!MASK) values[at] = block.plane[row * p.width + block.first + c];
        }
      }
    });
  }
}

template <class T>
void decode_plane(const RleRuns& r, T* out) {
  const int64_t h = r.height, w = r.width;
  for (int64_t i = 0; i < h * w; ++i) out[i] = 0;
  const T* values = static_cast<const T*>(r.values);
  T before = 0;
  for (int64_t run = 0, position = 0; run < r.runs; ++run) {
    const int64_t count = r.counts[run];
    if (count == 0) continue;
    const T value = values != nullptr ? values[run] : T(run & 1);
    const int64_t row = position % h;
    if (row > 0) out[row * w + position / h] = T(value ^ before);
    // the top of a column has no row above it
    for (int64_t c = ceil_div(position, h); c * h < position + count; ++c) out[c] = value;
    position += count;
    before = value;
  }
  for (int64_t i = w; i < h * w; ++i) out[i] = T(out[i] ^ out[i - w]);
}

}  // namespace

void rle_count(const RlePlanes& p, int64_t* counts, int64_t begin, int64_t end) {
  if (p.mask) return count_blocks<uint8_t, true>(p, counts, begin, end);
  if (p.bytes == 1) return count_blocks<uint8_t, false>(p, counts, begin, end);
  if (p.bytes == 4) return count_blocks<uint32_t, false>(p, counts, begin, end);
  count_blocks<uint64_t, false>(p, counts, begin, end);
}

void rle_write(const RlePlanes& p, const int64_t* places, int64_t* starts, void* values, int64_t begin, int64_t end) {
  if (p.mask) return write_blocks<uint8_t, true>(p, places, starts, nullptr, begin, end);
  if (p.bytes == 1) return write_blocks<uint8_t, false>(p, places, starts, static_cast<uint8_t*>(values), begin, end);
  if (p.bytes == 4) return write_blocks<uint32_t, false>(p, places, starts, static_cast<uint32_t*>(values), begin, end);
  write_blocks<uint64_t, false>(p, places, starts, static_cast<uint64_t*>(values), begin, end);
}

void rle_plane(const RleRuns& r, void* out) {
  if (r.bytes == 1) return decode_plane(r, static_cast<uint8_t*>(out));
  if (r.bytes == 4) return decode_plane(r, static_cast<uint32_t*>(out));
  decode_plane(r, static_cast<uint64_t*>(out));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>
#include <numeric>

#include "common/host.h"

namespace pydl {

PYDL_CPU_DECLARE(void, rle_count, const RlePlanes&, int64_t*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, rle_write, const RlePlanes&, const int64_t*, int64_t*, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, rle_plane, const RleRuns&, void*)

namespace {

using host::Array;
using host::Output;
using host::Sizes;
using host::Tensor;

// ---- encoding

struct Encoded {
  Output values, counts, lengths;
};

Encoded encode(const char* op, const Array& meta, bool mask) {
  STD_TORCH_CHECK(meta.dim >= 2, op, ": planes must have shape [..., H, W], got ", meta.dim, " dimensions");
  const int64_t h = meta.sizes[meta.dim - 2], w = meta.sizes[meta.dim - 1];
  int64_t batch = 1;
  for (int64_t d = 0; d < meta.dim - 2; ++d) batch *= meta.sizes[d];
  const RlePlanes p{meta.data, batch, h, w, host::size_of(meta.dtype), mask};
  const int64_t items = h > 0 ? batch * ((w + kBlock - 1) / kBlock) : 0, work = h * 4;
  Sizes places(size_t(batch * w), 0);
  host::parallel(items, work,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(rle_count)(p, places.data(), begin, end); });
  Output lengths = host::empty(meta.sizes, meta.dim - 2, Dtype::kInt64);
  int64_t* length = static_cast<int64_t*>(lengths.data);
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = total;
    for (int64_t c = b * w; c < (b + 1) * w; ++c) total += std::exchange(places[size_t(c)], total);
    total += mask ? 1 : 0;  // after the last change
    length[b] = total - first;
  }
  Output counts = host::empty(&total, 1, Dtype::kInt64);
  const int64_t values_size = mask ? 0 : total;
  Output values = host::empty(&values_size, 1, meta.dtype);
  int64_t* starts = static_cast<int64_t*>(counts.data);
  host::parallel(items, work, [&](int64_t begin, int64_t end) {
    PYDL_CPU_DISPATCH(rle_write)(p, places.data(), starts, values.data, begin, end);
  });
  for (int64_t b = 0; b < batch; starts += length[b++]) {
    // the start of each run becomes its length; a mask has one run more than changes, which begins at 0
    if (mask) {
      std::adjacent_difference(starts, starts + length[b] - 1, starts);
      starts[length[b] - 1] = h * w - std::accumulate(starts, starts + length[b] - 1, int64_t(0));
    } else {
      for (int64_t i = 0; i < length[b]; ++i) starts[i] = (i + 1 < length[b] ? starts[i + 1] : h * w) - starts[i];
    }
  }
  return {std::move(values), std::move(counts), std::move(lengths)};
}

std::tuple<Tensor, Tensor> rle_encode(const Tensor& masks_in) {
  const Tensor masks = host::as_contiguous(masks_in);
  const Array meta(masks);
  STD_TORCH_CHECK(meta.dtype == Dtype::kBool || meta.dtype == Dtype::kUInt8,
                  "rle_encode: masks must be bool or uint8, got ", host::name_of(meta.dtype));
  Encoded e = encode("rle_encode", meta, true);
  return {std::move(e.counts.tensor), std::move(e.lengths.tensor)};
}

void check_labels(const char* op, const char* name, Dtype dtype) {
  STD_TORCH_CHECK(dtype == Dtype::kUInt8 || dtype == Dtype::kInt32 || dtype == Dtype::kInt64, op, ": ", name,
                  " must be uint8, int32 or int64, got ", host::name_of(dtype));
}

std::tuple<Tensor, Tensor, Tensor> rle_encode_labels(const Tensor& labels_in) {
  const Tensor labels = host::as_contiguous(labels_in);
  const Array meta(labels);
  check_labels("rle_encode_labels", "labels", meta.dtype);
  Encoded e = encode("rle_encode_labels", meta, false);
  return {std::move(e.values.tensor), std::move(e.counts.tensor), std::move(e.lengths.tensor)};
}

// ---- decoding

// Where the parts begin whose lengths are given; their sum must be `total`.
Sizes offsets_of(const char* op, const Array& lengths, int64_t total) {
  STD_TORCH_CHECK(lengths.dtype == Dtype::kInt64, op, ": lengths must be int64, got ", host::name_of(lengths.dtype));
  const int64_t* length = static_cast<const int64_t*>(lengths.data);
  Sizes offsets(size_t(lengths.numel()) + 1, 0);
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    STD_TORCH_CHECK(length[i] >= 0 && length[i] <= total - offsets[i], op,
                    ": lengths must be at least 0 and add up to ", total, ", the number of counts, got ", length[i],
                    " at position ", i);
    offsets[i + 1] = offsets[i] + length[i];
  }
  STD_TORCH_CHECK(offsets.back() == total, op, ": lengths must add up to ", total, ", the number of counts, got ",
                  offsets.back());
  return offsets;
}

const int64_t* vector_of(const char* op, const char* name, const Array& meta) {
  STD_TORCH_CHECK(meta.dim == 1 && meta.dtype == Dtype::kInt64, op, ": ", name,
                  " must be one-dimensional and int64, got ", meta.dim, " dimensions of ", host::name_of(meta.dtype));
  return static_cast<const int64_t*>(meta.data);
}

Tensor decode(const char* op, const Array* values, const Array& counts, const Array& lengths, int64_t h, int64_t w) {
  const int64_t* count = vector_of(op, "counts", counts);
  STD_TORCH_CHECK(h >= 0 && w >= 0 && (w == 0 || h <= INT64_MAX / w), op, ": height and width must be at least 0, got ",
                  h, " and ", w);
  const Sizes offsets = offsets_of(op, lengths, counts.sizes[0]);
  const int64_t batch = lengths.numel();
  for (int64_t b = 0; b < batch; ++b) {
    int64_t left = h * w;
    for (int64_t i = offsets[size_t(b)]; i < offsets[size_t(b) + 1]; ++i) {
      STD_TORCH_CHECK(count[i] >= 0 && count[i] <= left, op, ": counts of each plane must be at least 0 and add up to ",
                      h, " x ", w, ", got ", count[i], " with ", left, " left, in plane ", b);
      left -= count[i];
    }
    STD_TORCH_CHECK(left == 0, op, ": counts of each plane must add up to ", h, " x ", w, ", but ", left,
                    " are missing in plane ", b);
  }
  Sizes sizes(lengths.sizes, lengths.sizes + lengths.dim);
  sizes.insert(sizes.end(), {h, w});
  Output out = host::empty(sizes.data(), int64_t(sizes.size()), values != nullptr ? values->dtype : Dtype::kBool);
  if (h * w == 0) return std::move(out.tensor);
  const int64_t bytes = values != nullptr ? host::size_of(values->dtype) : 1;
  host::parallel(batch, h * w / 4 + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = offsets[size_t(b)], runs = offsets[size_t(b) + 1] - first;
      const char* own = values != nullptr ? static_cast<const char*>(values->data) + first * bytes : nullptr;
      PYDL_CPU_DISPATCH(rle_plane)({own, count + first, runs, h, w, bytes},
                                   static_cast<char*>(out.data) + b * h * w * bytes);
    }
  });
  return std::move(out.tensor);
}

Tensor rle_decode(const Tensor& counts_in, const Tensor& lengths_in, int64_t height, int64_t width) {
  const Tensor counts = host::as_contiguous(counts_in), lengths = host::as_contiguous(lengths_in);
  return decode("rle_decode", nullptr, Array(counts), Array(lengths), height, width);
}

Tensor rle_decode_labels(const Tensor& values_in, const Tensor& counts_in, const Tensor& lengths_in, int64_t height,
                         int64_t width) {
  const char* const op = "rle_decode_labels";
  const Tensor values = host::as_contiguous(values_in);
  const Tensor counts = host::as_contiguous(counts_in), lengths = host::as_contiguous(lengths_in);
  const Array meta(values), counts_meta(counts);
  check_labels(op, "values", meta.dtype);
  STD_TORCH_CHECK(meta.dim == 1 && counts_meta.dim == 1 && meta.sizes[0] == counts_meta.sizes[0], op,
                  ": values must be one-dimensional, one for each count");
  return decode(op, &meta, counts_meta, Array(lengths), height, width);
}

// ---- text: a count is the difference to the count before the last one, from the fourth on; in groups of five bits,
// the lowest first, each with a sixth bit that says whether another follows; as characters from '0' on.

constexpr int64_t kGroups = 13;  // hold 64 bits

int64_t difference(const int64_t* counts, int64_t i) {
  return i > 2 ? int64_t(uint64_t(counts[i]) - uint64_t(counts[i - 2])) : counts[i];
}

int64_t write_groups(int64_t x, uint8_t* out) {
  int64_t n = 0;
  for (bool more = true; more; ++n) {
    const int64_t group = x & 31;
    x >>= 5;
    more = (group & 16) != 0 ? x != -1 : x != 0;
    out[n] = uint8_t(48 + (more ? group | 32 : group));
  }
  return n;
}

Tensor rle_to_text(const Tensor& counts_in) {
  const Tensor counts = host::as_contiguous(counts_in);
  const Array meta(counts);
  const int64_t* count = vector_of("rle_to_text", "counts", meta);
  const int64_t n = meta.sizes[0];
  std::vector<uint8_t> text(size_t(n) * kGroups);
  int64_t size = 0;
  for (int64_t i = 0; i < n; ++i) {
    size += write_groups(difference(count, i), text.data() + size);
  }
  Output out = host::empty(&size, 1, Dtype::kUInt8);
  std::copy(text.begin(), text.begin() + size, static_cast<uint8_t*>(out.data));
  return std::move(out.tensor);
}

Tensor rle_from_text(const Tensor& text_in) {
  const Tensor text = host::as_contiguous(text_in);
  const Array meta(text);
  STD_TORCH_CHECK(meta.dim == 1 && meta.dtype == Dtype::kUInt8,
                  "rle_from_text: text must be one-dimensional and uint8, got ", meta.dim, " dimensions of ",
                  host::name_of(meta.dtype));
  const uint8_t* characters = static_cast<const uint8_t*>(meta.data);
  Sizes counts;
  uint64_t x = 0;
  int64_t group = 0;
  for (int64_t i = 0; i < meta.sizes[0]; ++i) {
    const int64_t bits = int64_t(characters[i]) - 48;
    STD_TORCH_CHECK(bits >= 0 && bits < 64 && group < kGroups, "rle_from_text: no run length has the character ",
                    int(characters[i]), ", at place ", i);
    x |= uint64_t(bits & 31) << (5 * group++);
    if ((bits & 32) != 0) continue;
    if ((bits & 16) != 0 && 5 * group < 64) x |= ~uint64_t(0) << (5 * group);
    if (counts.size() > 2) x += uint64_t(counts[counts.size() - 2]);
    counts.push_back(int64_t(x));
    x = 0;
    group = 0;
  }
  STD_TORCH_CHECK(group == 0, "rle_from_text: the text ends within a number");
  const int64_t total = int64_t(counts.size());
  Output out = host::empty(&total, 1, Dtype::kInt64);
  std::copy(counts.begin(), counts.end(), static_cast<int64_t*>(out.data));
  return std::move(out.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("rle_encode", TORCH_BOX(&rle_encode));
  m.impl("rle_decode", TORCH_BOX(&rle_decode));
  m.impl("rle_encode_labels", TORCH_BOX(&rle_encode_labels));
  m.impl("rle_decode_labels", TORCH_BOX(&rle_decode_labels));
  m.impl("rle_to_text", TORCH_BOX(&rle_to_text));
  m.impl("rle_from_text", TORCH_BOX(&rle_from_text));
}

}  // namespace
}  // namespace pydl

#endif
