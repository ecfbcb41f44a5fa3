// Matrix NMS (Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", 2020): each box decays by what the boxes
// of higher scores overlap it, less what those are overlapped themselves. A warp works on each box, in two launches.
#include "common/warp.h"
#include "cuda/nms_boxes.h"
#include "cuda/nms_order.h"

namespace pydl {
namespace {

constexpr int kMatrixThreads = 256;
constexpr int kMatrixWarps = kMatrixThreads / kWarp;

template <typename C>
struct MatrixNms {
  NmsCall call;
  const int64_t* order;
  Corners<C>* boxes;  // by position in the order, as the next two
  int64_t* classes;   // null: all of one class
  C* covered;         // the largest IoU with a box before it
  void* new_scores;   // in the order of the scores given
  bool gaussian;
  C sigma;
};

template <typename C>
__global__ void __launch_bounds__(kMatrixThreads, 1) matrix_nms_gather_kernel(MatrixNms<C> m) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= m.call.count) return;
  m.boxes[i] = load_corners<C>(m.call.boxes, m.call.box_dtype, m.order[i]);
  if (m.classes != nullptr) m.classes[i] = m.call.classes[m.order[i]];
}

// Calls f(i, iou) for the boxes before box j that overlap it and are of its class, lane by lane.
template <typename C, typename F>
__device__ void each_before(const MatrixNms<C>& m, int64_t j, F&& f) {
  const Corners<C> own = m.boxes[j];
  for (int64_t i = lane_in_warp(); i < j; i += kWarp) {
    const Corners<C> other = m.boxes[i];
    if (!meet(other, own) || (m.classes != nullptr && m.classes[i] != m.classes[j])) continue;
    C iou = iou_of(other, own);
    if (iou > C(0)) f(i, iou);
  }
}

// One box for each warp; the last boxes, which have the most before them, go first.
template <typename C>
__device__ int64_t box_of_warp(const MatrixNms<C>& m) {
  return m.call.count - 1 - (int64_t(blockIdx.x) * kMatrixWarps + threadIdx.x / kWarp);
}

template <typename C>
__global__ void __launch_bounds__(kMatrixThreads, 1) matrix_nms_cover_kernel(MatrixNms<C> m) {
  int64_t j = box_of_warp(m);
  if (j < 0) return;
  C most = 0;
  each_before(m, j, [&](int64_t, C iou) { most = max(most, iou); });
  most = warp_max(most);
  if (lane_in_warp() == 0) m.covered[j] = most;
}

// The smallest f(iou) / f(covered) and 1. For exp(-sigma x^2) that is the largest iou^2 - covered^2, and one
// exponential.
template <typename C>
__global__ void __launch_bounds__(kMatrixThreads, 1) matrix_nms_decay_kernel(MatrixNms<C> m) {
  int64_t j = box_of_warp(m);
  if (j < 0) return;
  C most = m.gaussian ? C(0) : C(-1);
  each_before(m, j, [&](int64_t i, C iou) {
    C covered = m.covered[i];
    if (m.gaussian) {
      most = max(most, product(iou, iou) - product(covered, covered));
    } else if (covered < C(1)) {  // a box that is covered altogether has no say
      most = max(most, (iou - C(1)) / (C(1) - covered));
    }
  });
  most = warp_max(most);
  if (lane_in_warp() != 0) return;
  C factor = m.gaussian ? exp(-m.sigma * most) : -most;
  int64_t row = m.order[j];
  C score = C(load_number(m.call.scores, m.call.score_dtype, row));
  store_number(m.new_scores, m.call.score_dtype, row, double(score * factor));
}

template <typename C>
void launch_matrix_nms(const DeviceGuard& guard, const NmsCall& call, const int64_t* order, void* new_scores,
                       bool gaussian, double sigma) {
  MatrixNms<C> m{call, order, nullptr, nullptr, nullptr, new_scores, gaussian, C(sigma)};
  NmsScratch scratch;
  scratch.want(m.boxes, call.count);
  scratch.want(m.covered, call.count);
  if (call.classes != nullptr) scratch.want(m.classes, call.count);
  scratch.allocate(guard);
  const unsigned grid = grid_size(ceil_div(call.count, int64_t(kMatrixWarps)));
  PYDL_LAUNCH(matrix_nms_gather_kernel<C>, grid_size(ceil_div(call.count, int64_t(kMatrixThreads))), kMatrixThreads, 0,
              guard.stream(), m);
  PYDL_LAUNCH(matrix_nms_cover_kernel<C>, grid, kMatrixThreads, 0, guard.stream(), m);
  PYDL_LAUNCH(matrix_nms_decay_kernel<C>, grid, kMatrixThreads, 0, guard.stream(), m);
}

Tensor matrix_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double sigma,
                  bool gaussian) {
  const DeviceGuard guard(boxes);
  const NmsInputs inputs("matrix_nms", guard, boxes, 4, scores, idxs);
  const NmsCall& call = inputs.call;
  STD_TORCH_CHECK(inputs.dim == 2, "matrix_nms: boxes must have shape [N, 4]");
  const Output out = empty_array(guard, call.count, call.score_dtype);
  if (call.count == 0) return out.tensor;
  const auto [keys, order] = sort_by_score(guard, call, nullptr, 0);
  const bool wide = call.box_dtype == Dtype::kDouble || call.score_dtype == Dtype::kDouble;
  const auto launch = wide ? launch_matrix_nms<double> : launch_matrix_nms<float>;
  launch(guard, call, static_cast<const int64_t*>(Array(order).data), out.data, gaussian, sigma);
  return out.tensor;
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("matrix_nms", TORCH_BOX(&matrix_nms)); }

}  // namespace pydl
