// What the CTC ops share: items of a batch, and on the host the arguments, checked.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace pydl {

struct CtcItem {
  const int32_t* labels;  // `length` of them, all in [0, classes) and none the blank
  int64_t frames, length;
  int64_t row_offset;  // of its 2 length + 1 states in a row of posteriors
};

// x [T, N, C] with unit stride over classes.
struct CtcInput {
  const void* x;
  Dtype dtype;
  int64_t frames, items, classes, stride_t, stride_n, blank;
  bool logits;
};

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include <algorithm>
#include <limits>

#include "common/host.h"

namespace pydl {
namespace {

using namespace host;

// Integers of a tensor, int32 or int64 by its dtype.
class Integers {
 public:
  Integers(const char* op, const char* name, const Tensor& t) : tensor_(as_contiguous(t)), array_(tensor_) {
    STD_TORCH_CHECK(array_.dtype == Dtype::kInt32 || array_.dtype == Dtype::kInt64, op, ": ", name,
                    " must be int32 or int64, got ", name_of(array_.dtype));
  }
  const Array& array() const { return array_; }
  int64_t operator[](int64_t i) const {
    return array_.dtype == Dtype::kInt32 ? static_cast<const int32_t*>(array_.data)[i]
                                         : static_cast<const int64_t*>(array_.data)[i];
  }

 private:
  Tensor tensor_;
  Array array_;
};

inline void check_log_probs(const char* op, const Array& x, int64_t blank) {
  STD_TORCH_CHECK(x.dim == 3 && is_floating(x.dtype), op,
                  ": x must have 3 dimensions and be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(blank >= 0 && blank < x.sizes[2], op, ": blank must be in [0, ", x.sizes[2], "), got ", blank);
}

inline void check_frames(const char* op, int64_t n, int64_t frames, int64_t most) {
  STD_TORCH_CHECK(frames >= 0 && frames <= most, op, ": item ", n, ": input length ", frames,
                  " must be in [0, T=", most, "]");
}

// The frames of each item where there are no targets: all of them without a tensor.
inline Sizes read_frames(const char* op, const std::optional<Tensor>& input_lengths, int64_t items, int64_t most) {
  if (!input_lengths.has_value()) return Sizes(size_t(items), most);
  const Integers lengths(op, "input_lengths", *input_lengths);
  STD_TORCH_CHECK(lengths.array().numel() == items, op, ": input_lengths must have N=", items, " elements");
  Sizes frames(static_cast<size_t>(items));
  for (int64_t n = 0; n < items; ++n) {
    frames[size_t(n)] = lengths[n];
    check_frames(op, n, lengths[n], most);
  }
  return frames;
}

// The arguments of an operator with targets. Lengths and labels that would lead out of a tensor are refused here.
class CtcBatch {
 public:
  CtcBatch(const char* op, const Tensor& log_probs, const Tensor& targets_in, const Tensor& input_lengths_in,
           const Tensor& target_lengths_in, int64_t blank, bool logits)
      : op_(op), original_(log_probs), tensor_(log_probs) {
    check_log_probs(op, original_, blank);
    if (original_.sizes[2] > 1 && original_.strides[2] != 1) tensor_ = torch::stable::contiguous(log_probs);
    const Array x(tensor_);
    input_ = {x.data, x.dtype, x.sizes[0], x.sizes[1], x.sizes[2], x.strides[0], x.strides[1], blank, logits};
    STD_TORCH_CHECK(input_.classes <= INT32_MAX, op, ": x must have fewer than 2^31 classes");
    const Integers targets(op, "targets", targets_in);
    const Integers input_lengths(op, "input_lengths", input_lengths_in);
    const Integers target_lengths(op, "target_lengths", target_lengths_in);
    const int64_t n = input_.items, dim = targets.array().dim;
    STD_TORCH_CHECK(dim == 1 || (dim == 2 && targets.array().sizes[0] == n), op,
                    ": targets must have shape [N, S] or [sum of target_lengths]");
    STD_TORCH_CHECK(input_lengths.array().numel() == n && target_lengths.array().numel() == n, op,
                    ": input_lengths and target_lengths must have N=", n, " elements");
    positions_ = targets.array().numel();
    padded_ = dim == 2 ? targets.array().sizes[1] : -1;
    read_items(targets, input_lengths, target_lengths);
  }

  const CtcInput& input() const { return input_; }
  const std::vector<CtcItem>& items() const { return items_; }
  Dtype compute() const { return compute_dtype(input_.dtype); }
  int64_t positions() const { return positions_; }  // elements of targets
  int64_t longest() const { return longest_; }      // target
  int64_t row_width() const { return padded_ >= 0 ? input_.items * (2 * padded_ + 1) : 2 * positions_ + input_.items; }

  // A gradient laid out as x is if that is the transpose of a contiguous tensor, else contiguous.
  Output empty_gradient() const {
    const int64_t t = input_.frames, n = input_.items, c = input_.classes;
    const int64_t turned_sizes[3] = {n, t, c}, turned_strides[3] = {c, t * c, 1};
    Array turned = original_;
    const int64_t strides[3] = {original_.strides[1], original_.strides[0], original_.strides[2]};
    turned.sizes = turned_sizes;
    turned.strides = strides;
    return !original_.contiguous() && turned.contiguous()
               ? empty_strided(original_.sizes, turned_strides, 3, input_.dtype)
               : empty(original_.sizes, 3, input_.dtype);
  }

 private:
  void read_items(const Integers& targets, const Integers& input_lengths, const Integers& target_lengths) {
    const int64_t limit = padded_ >= 0 ? padded_ : positions_;
    labels_.resize(size_t(positions_));
    items_.reserve(size_t(input_.items));
    int64_t start = 0, used = 0;
    for (int64_t n = 0; n < input_.items; ++n) {
      const int64_t frames = input_lengths[n], length = target_lengths[n];
      check_frames(op_, n, frames, input_.frames);
      if (padded_ >= 0) start = n * padded_;
      STD_TORCH_CHECK(length >= 0 && length <= (padded_ >= 0 ? limit : limit - start), op_, ": item ", n,
                      ": target length ", length, " does not fit targets");
      for (int64_t i = start; i < start + length; ++i) {
        const int64_t label = targets[i];
        STD_TORCH_CHECK(label >= 0 && label < input_.classes && label != input_.blank, op_, ": item ", n, ": label ",
                        label, " must be in [0, ", input_.classes, ") and not the blank");
        labels_[size_t(i)] = int32_t(label);
      }
      items_.push_back({labels_.data() + start, frames, length, 2 * start + n});
      longest_ = std::max(longest_, length);
      start += length;
      used += length;
    }
    STD_TORCH_CHECK(padded_ >= 0 || used == positions_, op_,
                    ": targets must hold as many labels as target_lengths say, ", used, ", got ", positions_);
  }

  const char* op_;
  const Array original_;
  Tensor tensor_;
  CtcInput input_{};
  int64_t positions_ = 0, padded_ = -1, longest_ = 0;
  std::vector<int32_t> labels_;
  std::vector<CtcItem> items_;
};

}  // namespace
}  // namespace pydl

#endif
