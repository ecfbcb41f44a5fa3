// What the CTC kernels share: the problem as kernels see it, the facts of one item, labels, and host-side checks.
#pragma once

#include <algorithm>

#include "common/cuda_host.h"
#include "common/indexing.h"
#include "common/warp.h"

namespace pydl {
namespace {

using cuda_host::DeviceGuard;
using host::Array;
using host::Output;
using host::Tensor;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Log-probabilities (or logits) x [T, N, C] of any strides, in elements; targets [N, S] or one after the other.
struct Ctc {
  const void* x;
  int64_t x_frame, x_item, x_class;
  int64_t frames, items;
  int classes, blank;
  const void* targets;
  int64_t target_item, target_step;
  int64_t target_count;  // S of [N, S], else all of them
  const void* input_lengths;
  const void* target_lengths;
  bool wide_targets, wide_inputs, wide_lengths;  // int64, else int32
  bool packed;                                   // targets are one after the other
  int max_length;                                // of a target; a longer one is bad
  int64_t row_width;                             // states of all items at one frame
};

__device__ inline int64_t read_integer(const void* values, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}

// One item of the batch. Its 2 L + 1 states, blank and label in turn, are at `row` in the states of a frame.
struct Item {
  int frames, labels;
  int64_t first;         // position of its first label when targets are contiguous
  int64_t first_target;  // offset of its first label in targets
  int64_t row;
  bool bad;  // a length is out of range: there are no labels then, and frames is the nearest length in range
};

// Labels before item n. A bad length counts as none; all threads of the block must call it.
__device__ inline int64_t packed_start(const Ctc& c, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    int64_t length = read_integer(c.target_lengths, c.wide_lengths, i);
    sum += length < 0 ? 0 : (length > c.target_count ? c.target_count + 1 : length);
  }
  sum = block_sum(sum);
  if (sum <= c.target_count) return sum;
  sum = 0;  // a length led out of targets: which one depends on those before it
  for (int64_t i = 0; i < n; ++i) {
    int64_t length = read_integer(c.target_lengths, c.wide_lengths, i);
    if (length >= 0 && length <= c.target_count - sum) sum += length;
  }
  return sum;
}

// All threads of the block must call it.
__device__ inline Item item_of(const Ctc& c, int64_t n) {
  Item item;
  item.first = c.packed ? packed_start(c, n) : n * c.target_count;
  item.first_target = c.packed ? item.first * c.target_step : n * c.target_item;
  item.row = 2 * item.first + n;
  int64_t frames = read_integer(c.input_lengths, c.wide_inputs, n);
  int64_t labels = read_integer(c.target_lengths, c.wide_lengths, n);
  int64_t room = c.packed ? c.target_count - item.first : c.target_count;
  item.bad = frames < 0 || frames > c.frames || labels < 0 || labels > room || labels > c.max_length;
  item.frames = int(frames < 0 ? 0 : (frames > c.frames ? c.frames : frames));
  item.labels = item.bad ? 0 : int(labels);
  return item;
}

__device__ inline int64_t label_at(const Ctc& c, const Item& item, int position) {
  return read_integer(c.targets, c.wide_targets, item.first_target + position * c.target_step);
}

__device__ inline bool is_label(const Ctc& c, int64_t label) {
  return label >= 0 && label < c.classes && label != c.blank;
}

inline bool is_integer(Dtype dtype) { return dtype == Dtype::kInt32 || dtype == Dtype::kInt64; }

// What both directions check: with these, no length and no label can lead out of memory.
inline Ctc make_ctc(const char* op, const DeviceGuard& guard, const Array& x, const Tensor& targets_in,
                    const Tensor& input_lengths_in, const Tensor& target_lengths_in, int64_t blank) {
  const Array targets(targets_in), inputs(input_lengths_in), lengths(target_lengths_in);
  constexpr int64_t kLimit = int64_t(1) << 30;
  STD_TORCH_CHECK(x.dim == 3, op, ": x must have 3 dimensions, got ", x.dim);
  STD_TORCH_CHECK(host::is_floating(x.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const int64_t frames = x.sizes[0], items = x.sizes[1], classes = x.sizes[2];
  STD_TORCH_CHECK(frames <= kLimit && items <= kLimit && classes <= kLimit, op, ": x must not exceed 2^30 along a ",
                  "dimension, got ", frames, " x ", items, " x ", classes);
  STD_TORCH_CHECK(blank >= 0 && blank < classes, op, ": blank must be in [0, ", classes, "), got ", blank);
  STD_TORCH_CHECK(is_integer(targets.dtype) && is_integer(inputs.dtype) && is_integer(lengths.dtype), op,
                  ": targets and lengths must be int32 or int64");
  STD_TORCH_CHECK(targets.dim == 1 || (targets.dim == 2 && targets.sizes[0] == items), op, ": targets must be 1-D or ",
                  items, " rows");
  for (const Array* a : {&inputs, &lengths}) {
    STD_TORCH_CHECK(a->dim == 1 && a->sizes[0] == items && a->contiguous(), op, ": lengths must be contiguous, ", items,
                    " of each");
  }
  guard.check_same(op, "targets", targets_in);
  guard.check_same(op, "input_lengths", input_lengths_in);
  guard.check_same(op, "target_lengths", target_lengths_in);
  const bool packed = targets.dim == 1;
  const int64_t count = packed ? targets.sizes[0] : targets.sizes[1];
  Ctc c{};
  c.x = x.data, c.x_frame = x.strides[0], c.x_item = x.strides[1], c.x_class = x.strides[2];
  c.frames = frames, c.items = items, c.classes = int(classes), c.blank = int(blank);
  c.targets = targets.data, c.target_count = count, c.packed = packed;
  c.target_item = packed ? 0 : targets.strides[0], c.target_step = packed ? targets.strides[0] : targets.strides[1];
  c.input_lengths = inputs.data, c.target_lengths = lengths.data;
  c.wide_targets = targets.dtype == Dtype::kInt64;
  c.wide_inputs = inputs.dtype == Dtype::kInt64;
  c.wide_lengths = lengths.dtype == Dtype::kInt64;
  c.max_length = int(std::min(count, kLimit));
  c.row_width = packed ? 2 * count + items : items * (2 * count + 1);
  return c;
}

}  // namespace
}  // namespace pydl
