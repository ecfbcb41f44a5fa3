// Arguments and device memory of the ops that select among boxes.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "common/cuda_host.h"
#include "cuda/nms_numbers.h"

namespace pydl {
namespace {

using namespace cuda_host;

// What the caller gave: images of `count` boxes each, and what is wanted of them.
struct NmsCall {
  const void* boxes;
  const void* scores;
  const int64_t* classes;  // null: all of one class
  int64_t images, count, most;
  double iou_threshold;
  double score_threshold;  // used if limited
  bool limited;
  Dtype box_dtype, score_dtype;
};

// What memory safety needs: boxes [..., count, width], scores and idxs of shape [..., count]. All contiguous from here
// on.
struct NmsInputs {
  NmsInputs(const char* op, const DeviceGuard& guard, const Tensor& boxes_in, int64_t width, const Tensor& scores_in,
            const std::optional<Tensor>& idxs_in)
      : boxes(host::as_contiguous(boxes_in)), scores(host::as_contiguous(scores_in)) {
    guard.check_same(op, "scores", scores);
    if (idxs_in) guard.check_same(op, "idxs", *idxs_in);
    const Array b(boxes), s(scores);
    dim = b.dim;
    STD_TORCH_CHECK(dim == 2 || dim == 3, op, ": boxes must have 2 or 3 dimensions, got ", dim);
    STD_TORCH_CHECK(host::is_floating(b.dtype) && host::is_floating(s.dtype), op,
                    ": boxes and scores must be floating point");
    STD_TORCH_CHECK(b.sizes[b.dim - 1] == width, op, ": boxes must have ", width, " numbers each, got ",
                    b.sizes[b.dim - 1]);
    const auto matches = [&](const Array& other) {
      return other.dim == b.dim - 1 && std::equal(other.sizes, other.sizes + other.dim, b.sizes);
    };
    STD_TORCH_CHECK(matches(s), op, ": scores must have the shape of boxes without the last dimension");
    call.boxes = b.data;
    call.box_dtype = b.dtype;
    call.scores = s.data;
    call.score_dtype = s.dtype;
    call.images = b.dim == 3 ? b.sizes[0] : 1;
    call.count = b.sizes[b.dim - 2];
    STD_TORCH_CHECK(call.images < kMaxGridX && call.count < kMaxGridX, op, ": at most 2^31 - 2 images and boxes each");
    if (!idxs_in) return;
    idxs = host::as_contiguous(*idxs_in);
    const Array c(*idxs);
    STD_TORCH_CHECK(c.dtype == Dtype::kInt64 && matches(c), op, ": idxs must be int64 and have the shape of scores");
    call.classes = static_cast<const int64_t*>(c.data);
  }

  Tensor boxes, scores;
  std::optional<Tensor> idxs;
  int64_t dim = 0;
  NmsCall call{};
};

inline Output empty_array(const DeviceGuard& guard, int64_t count, Dtype dtype) {
  const int64_t stride = 1;
  return guard.empty_strided(&count, &stride, 1, dtype);
}

// A tensor of the first elements of an array.
inline Tensor first_of(const DeviceGuard& guard, const Output& array, int64_t count, Dtype dtype) {
  const Output out = empty_array(guard, count, dtype);
  if (count > 0) guard.copy(out.data, array.data, size_t(count * host::size_of(dtype)));
  return out.tensor;
}

inline Output empty_matrix(const DeviceGuard& guard, std::array<int64_t, 2> sizes, Dtype dtype) {
  const std::array<int64_t, 2> strides{std::max<int64_t>(sizes[1], 1), 1};
  return guard.empty_strided(sizes.data(), strides.data(), 2, dtype);
}

// Device memory for the arrays of one call, cut from one allocation.
class NmsScratch {
 public:
  template <typename T>
  void want(T*& array, int64_t count) {
    wanted_.push_back({reinterpret_cast<void**>(&array), bytes_});
    bytes_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
  }
  void want_bytes(void*& array, int64_t bytes) {
    wanted_.push_back({&array, bytes_});
    bytes_ += (bytes + 255) / 256 * 256;
  }
  void allocate(const DeviceGuard& guard) {
    memory_ = empty_matrix(guard, {1, bytes_}, Dtype::kUInt8);
    for (auto& [array, offset] : wanted_) *array = static_cast<char*>(memory_->data) + offset;
  }

 private:
  std::vector<std::pair<void**, int64_t>> wanted_;
  std::optional<Output> memory_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace pydl
