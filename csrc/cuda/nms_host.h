// Host functions of non-maximum suppression for any kind of box: checks, memory, launches.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "common/cuda_host.h"
#include "cuda/nms_kernels.h"

namespace pydl {
namespace {

using namespace cuda_host;

// What memory safety needs: boxes [..., count, width], scores and idxs of shape [..., count]. All contiguous from here
// on.
struct NmsInputs {
  NmsInputs(const char* op, const Tensor& boxes_in, int64_t width, const Tensor& scores_in,
            const std::optional<Tensor>& idxs_in)
      : boxes(host::as_contiguous(boxes_in)), scores(host::as_contiguous(scores_in)) {
    const Array b(boxes), s(scores);
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
  NmsCall call{};
};

inline Output empty_like_sizes(const DeviceGuard& guard, std::array<int64_t, 2> sizes, Dtype dtype) {
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
    memory_ = empty_like_sizes(guard, {1, bytes_}, Dtype::kUInt8);
    for (auto& [array, offset] : wanted_) *array = static_cast<char*>(memory_->data) + offset;
  }

 private:
  std::vector<std::pair<void**, int64_t>> wanted_;
  std::optional<Output> memory_;
  int64_t bytes_ = 0;
};

// torch's stable ascending sort of the last dimension: values, and where they came from.
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

inline const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(Array(tensor).data); }

template <typename Geometry>
void launch_images(const NmsCall& call, NmsBuffers& buffers, const Geometry& geometry, cudaStream_t stream) {
  int padded = 1;
  while (padded < call.count) padded *= 2;
  const size_t shared = size_t(padded) * (sizeof(uint64_t) + sizeof(uint16_t));
  PYDL_LAUNCH(nms_image_kernel<Geometry>, grid_size(call.images), kNmsThreads, shared, stream, call, buffers, geometry,
              padded);
}

template <typename Geometry>
void launch_large(const DeviceGuard& guard, const NmsCall& call, NmsBuffers& buffers, const Geometry& geometry,
                  NmsLong& longs) {
  const cudaStream_t stream = guard.stream();
  const int64_t positions = call.images * call.count;
  const unsigned grid = grid_size(ceil_div(positions, int64_t(kNmsSimple)));
  const int blocks = std::min(multiprocessor_count(), resident_blocks(nms_segments_kernel<Geometry>, kNmsThreads, 0));
  const Output keys = empty_like_sizes(guard, {call.images, call.count}, Dtype::kInt64);
  PYDL_LAUNCH(nms_keys_kernel, grid, kNmsSimple, 0, stream, call, static_cast<int64_t*>(keys.data), longs, blocks);
  const auto [sorted_keys, order] = stable_sort(keys.tensor);
  NmsSorted sorted{integers(sorted_keys), integers(order), nullptr, nullptr};
  std::optional<std::pair<Tensor, Tensor>> by_class;
  if (call.classes != nullptr) {
    const Output classes = empty_like_sizes(guard, {call.images, call.count}, Dtype::kInt64);
    PYDL_LAUNCH(nms_classes_kernel, grid, kNmsSimple, 0, stream, call, sorted.order,
                static_cast<int64_t*>(classes.data));
    by_class = stable_sort(classes.tensor);
    sorted.classes = integers(by_class->first);
    sorted.ranks = integers(by_class->second);
  }
  PYDL_LAUNCH(nms_gather_kernel<Geometry>, grid, kNmsSimple, 0, stream, call, buffers, sorted, longs);
  PYDL_LAUNCH_COOPERATIVE(nms_segments_kernel<Geometry>, blocks, kNmsThreads, 0, stream, call, buffers, sorted, longs,
                          geometry);
  PYDL_LAUNCH(nms_write_kernel, grid_size(call.images), kNmsThreads, 0, stream, call, buffers, sorted);
}

// Indices [images, most] filled up with -1, and counts [images].
template <typename Geometry>
std::pair<Output, Output> suppress(const DeviceGuard& guard, const NmsCall& call, const Geometry& geometry) {
  Output indices = empty_like_sizes(guard, {call.images, call.most}, Dtype::kInt64);
  const int64_t sizes[] = {call.images}, strides[] = {1};
  Output counts = guard.empty_strided(sizes, strides, 1, Dtype::kInt64);
  if (call.images == 0) return {std::move(indices), std::move(counts)};
  const int64_t positions = call.images * call.count;
  const bool large = call.count > kNmsOneBlock;
  NmsBuffers buffers{static_cast<int64_t*>(indices.data), static_cast<int64_t*>(counts.data), nullptr, nullptr,
                     nullptr};
  NmsLong longs{};
  NmsScratch scratch;
  scratch.want(buffers.gone, positions);
  scratch.want_bytes(buffers.sorted_boxes, positions * int64_t(sizeof(typename Geometry::Box)));
  if (large) {
    scratch.want(longs.begins, positions / kNmsOneBlock);
    scratch.want(longs.ends, positions / kNmsOneBlock);
    scratch.want(longs.count, 1);
    scratch.want(longs.barriers, multiprocessor_count());
  } else if (call.classes != nullptr) {
    scratch.want(buffers.sorted_classes, positions);
  }
  scratch.allocate(guard);
  if (large) {
    launch_large(guard, call, buffers, geometry, longs);
  } else {
    launch_images(call, buffers, geometry, guard.stream());
  }
  return {std::move(indices), std::move(counts)};
}

// The kept boxes of one image as a tensor of their number, for which the host waits.
template <typename Geometry>
Tensor suppress_all(const DeviceGuard& guard, NmsCall call, const Geometry& geometry) {
  call.most = call.count;
  const auto [indices, counts] = suppress(guard, call, geometry);
  int64_t kept = 0;
  guard.read(&kept, counts.data, sizeof(kept));
  const int64_t stride = 1;
  const Output out = guard.empty_strided(&kept, &stride, 1, Dtype::kInt64);
  if (kept > 0) guard.copy(out.data, indices.data, size_t(kept) * sizeof(int64_t));
  return out.tensor;
}

}  // namespace
}  // namespace pydl
