// Host functions of non-maximum suppression for any kind of box: memory and launches.
#pragma once

#include "cuda/nms_kernels.h"

namespace pydl {
namespace {

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
  const auto [sorted_keys, order] = sort_by_score(guard, call, longs.words, 1 + blocks);
  NmsSorted sorted{integers(sorted_keys), integers(order), nullptr, nullptr};
  std::optional<std::pair<Tensor, Tensor>> by_class;
  if (call.classes != nullptr) {
    const Output classes = empty_matrix(guard, {call.images, call.count}, Dtype::kInt64);
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
  Output indices = empty_matrix(guard, {call.images, call.most}, Dtype::kInt64);
  Output counts = empty_array(guard, call.images, Dtype::kInt64);
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
    scratch.want(longs.words, 1 + multiprocessor_count());
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
  return first_of(guard, indices, kept, Dtype::kInt64);
}

}  // namespace
}  // namespace pydl
