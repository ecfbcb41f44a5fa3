// Boxes in order of decreasing score.
#pragma once

#include "cuda/nms_inputs.h"

namespace pydl {
namespace {

constexpr int kNmsSimple = 256;  // threads of the kernels with one thread per box

constexpr uint64_t kNmsExcluded = ~uint64_t(0);

// A key that ascends while scores descend: NaN comes first, zeros of both signs are equal. Excluded boxes come last.
__device__ inline uint64_t score_key(const NmsCall& call, int64_t i) {
  double score = load_number(call.scores, call.score_dtype, i);
  if (call.limited && !(score > call.score_threshold)) return kNmsExcluded;
  if (score != score) return 0;
  uint64_t bits = uint64_t(__double_as_longlong(score + 0.0)), sign = uint64_t(1) << 63;
  return bits & sign ? bits : ~(bits | sign);
}

// Also zeroes some words for the kernels that follow.
__global__ void __launch_bounds__(kNmsSimple, 1)
    nms_keys_kernel(NmsCall call, int64_t* __restrict__ keys, unsigned* __restrict__ words, int word_count) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < word_count) words[i] = 0;
  // torch sorts signed integers
  if (i < call.images * call.count) keys[i] = int64_t(score_key(call, i) ^ uint64_t(1) << 63);
}

// torch's stable ascending sort of the last dimension: values, and where they came from.
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Keys and indices of each image's boxes, best first; excluded boxes come last and have the largest key.
inline std::pair<Tensor, Tensor> sort_by_score(const DeviceGuard& guard, const NmsCall& call, unsigned* words,
                                               int word_count) {
  const Output keys = empty_matrix(guard, {call.images, call.count}, Dtype::kInt64);
  const int64_t items = std::max<int64_t>(call.images * call.count, word_count);
  PYDL_LAUNCH(nms_keys_kernel, grid_size(ceil_div(items, int64_t(kNmsSimple))), kNmsSimple, 0, guard.stream(), call,
              static_cast<int64_t*>(keys.data), words, word_count);
  return stable_sort(keys.tensor);
}

}  // namespace
}  // namespace pydl
