// Soft-NMS (Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", 2017) in one block: each round
// takes the best box, and decays the scores of those that overlap it while the next best is found. A thread owns the
// boxes whose index leaves its number when divided by the number of threads, and nobody else touches their scores.
#include "common/shared.h"
#include "common/threshold.h"
#include "cuda/nms_boxes.h"
#include "cuda/nms_inputs.h"

namespace pydl {
namespace {

constexpr int kSoftThreads = 1024;

struct SoftNms {
  const void* boxes;
  const void* scores;
  const int64_t* classes;  // null: all of one class
  int64_t count;
  Dtype box_dtype, score_dtype;
  bool gaussian;
  double iou_threshold, sigma, score_threshold;
  int64_t* indices;  // results: [count], as the next one
  void* new_scores;
  int64_t* taken;
};

// A box that may be the best; index -1: none. Of equal scores the first wins.
template <typename C>
struct Candidate {
  C score;
  int64_t index;

  __device__ void meet_other(C other_score, int64_t other) {
    bool better = other >= 0 && (index < 0 || other_score > score || (other_score == score && other < index));
    score = better ? other_score : score;
    index = better ? other : index;
  }
};

template <typename C>
__device__ Candidate<C> best_of_block(Candidate<C> own, C* scores, int64_t* indices) {
  auto best_of_warp = [&] {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      C score = __shfl_xor_sync(kFullMask, own.score, offset);
      long long index = __shfl_xor_sync(kFullMask, static_cast<long long>(own.index), offset);
      own.meet_other(score, index);
    }
  };
  best_of_warp();
  int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  if (lane == 0) {
    scores[warp] = own.score;
    indices[warp] = own.index;
  }
  __syncthreads();
  bool there = lane < int(blockDim.x) / kWarp;
  own.score = there ? scores[lane] : C(0);
  own.index = there ? indices[lane] : -1;
  __syncthreads();
  best_of_warp();
  return own;
}

template <typename C>
__global__ void __launch_bounds__(kSoftThreads, 1) soft_nms_kernel(SoftNms job, Corners<C>* boxes, C* scores) {
  PYDL_SHARED(C, best_scores, kWarp);
  PYDL_SHARED(int64_t, best_indices, kWarp);
  const C out_of_play = C(NAN), least = job.gaussian ? C(0) : C(job.iou_threshold), floor = C(job.score_threshold);
  Candidate<C> own{0, -1};
  for (int64_t i = threadIdx.x; i < job.count; i += blockDim.x) {
    boxes[i] = load_corners<C>(job.boxes, job.box_dtype, i);
    C score = C(load_number(job.scores, job.score_dtype, i));
    scores[i] = score >= floor ? score : out_of_play;
    if (score >= floor) own.meet_other(score, i);
  }
  int64_t taken = 0;
  while (true) {
    Candidate<C> best = best_of_block(own, best_scores, best_indices);
    if (best.index < 0) break;
    if (threadIdx.x == 0) {
      job.indices[taken] = best.index;
      store_number(job.new_scores, job.score_dtype, taken, double(best.score));
    }
    ++taken;
    Corners<C> box = boxes[best.index];
    int64_t own_class = job.classes == nullptr ? 0 : job.classes[best.index];
    own = {0, -1};
    for (int64_t i = threadIdx.x; i < job.count; i += blockDim.x) {
      C score = scores[i];
      if (i == best.index) score = scores[i] = out_of_play;
      if (score != score) continue;
      Corners<C> other = boxes[i];
      C iou = meet(box, other) ? iou_of(box, other) : C(0);
      if (iou > C(0) && iou > least && (job.classes == nullptr || job.classes[i] == own_class)) {
        score *= job.gaussian ? exp(-product(iou, iou) / C(job.sigma)) : C(1) - iou;
        scores[i] = score = score >= floor ? score : out_of_play;
      }
      if (score == score) own.meet_other(score, i);
    }
  }
  if (threadIdx.x == 0) *job.taken = taken;
}

template <typename C>
void launch_soft_nms(const DeviceGuard& guard, SoftNms job) {
  Corners<C>* boxes = nullptr;
  C* scores = nullptr;
  NmsScratch scratch;
  scratch.want(boxes, job.count);
  scratch.want(scores, job.count);
  scratch.allocate(guard);
  const int64_t threads = std::min<int64_t>(kSoftThreads, ceil_div<int64_t>(job.count, kWarp) * kWarp);
  PYDL_LAUNCH(soft_nms_kernel<C>, 1, unsigned(threads), 0, guard.stream(), job, boxes, scores);
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                    double iou_threshold, double sigma, double score_threshold, bool gaussian) {
  const DeviceGuard guard(boxes);
  const NmsInputs inputs("soft_nms", guard, boxes, 4, scores, idxs);
  const NmsCall& call = inputs.call;
  STD_TORCH_CHECK(inputs.dim == 2, "soft_nms: boxes must have shape [N, 4]");
  const bool wide = call.box_dtype == Dtype::kDouble || call.score_dtype == Dtype::kDouble;
  const Output indices = empty_array(guard, call.count, Dtype::kInt64);
  const Output new_scores = empty_array(guard, call.count, call.score_dtype);
  const Output taken = empty_array(guard, 1, Dtype::kInt64);
  int64_t kept = 0;
  if (call.count > 0) {
    const SoftNms job{call.boxes,
                      call.scores,
                      call.classes,
                      call.count,
                      call.box_dtype,
                      call.score_dtype,
                      gaussian,
                      wide ? iou_threshold : double(float_below(iou_threshold)),
                      sigma,
                      wide ? score_threshold : double(float_above(score_threshold)),
                      static_cast<int64_t*>(indices.data),
                      new_scores.data,
                      static_cast<int64_t*>(taken.data)};
    wide ? launch_soft_nms<double>(guard, job) : launch_soft_nms<float>(guard, job);
    guard.read(&kept, taken.data, sizeof(kept));
  }
  return {first_of(guard, indices, kept, Dtype::kInt64), first_of(guard, new_scores, kept, call.score_dtype)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("soft_nms", TORCH_BOX(&soft_nms)); }

}  // namespace pydl
