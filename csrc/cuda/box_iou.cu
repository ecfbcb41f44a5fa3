// Agreement of every box of one set with every box of another, and its gradients. The forward writes each result once
// and reads only boxes. The backward takes each pair twice, once for each side, and adds in an order set by the shape.
#include "common/warp.h"
#include "cuda/box_device.h"

namespace pydl {
namespace {

// ---- kernels

constexpr int kTileRows = 64;

// A block's columns are `columns` wide, a power of two from 32 on; its other threads take further rows. The rows' boxes
// wait in shared memory, each thread's column box in registers.
template <typename T, int KIND>
__global__ void __launch_bounds__(kBoxThreads, 1)
    box_iou_kernel(const T* __restrict__ boxes1, const T* __restrict__ boxes2, acc_t<T>* __restrict__ out, int64_t n,
                   int64_t m, int columns, int64_t row_tiles, int64_t column_tiles, acc_t<T> eps, bool aligned) {
  using M = DeviceMath<acc_t<T>>;
  PYDL_SHARED(SizedBox<M>, rows, kTileRows);
  int64_t tile = blockIdx.x;
  int64_t column = tile % column_tiles * columns + threadIdx.x % columns;
  int64_t first = tile / column_tiles % row_tiles * kTileRows, set = tile / column_tiles / row_tiles;
  int count = int(min(int64_t(kTileRows), n - first));
  boxes1 += 4 * (set * n + first);
  if (int(threadIdx.x) < count) {
    rows[threadIdx.x] = sized_box<M, KIND, false>(load_box(boxes1 + 4 * threadIdx.x, aligned));
  }
  __syncthreads();
  if (column >= m) return;
  SizedBox<M> other = sized_box<M, KIND, false>(load_box(boxes2 + 4 * (set * m + column), aligned));
  out += (set * n + first) * m + column;
  for (int row = threadIdx.x / columns; row < count; row += kBoxThreads / columns) {
    out[row * m] = box_agreement<M, KIND, false>(rows[row], other, eps);
  }
}

// The gradient of boxes1: one block for each box.
template <typename T, int KIND>
__global__ void __launch_bounds__(kBoxThreads, 1)
    box_iou_rows_kernel(const acc_t<T>* __restrict__ dy, const T* __restrict__ boxes1, const T* __restrict__ boxes2,
                        T* __restrict__ dboxes1, int64_t n, int64_t m, acc_t<T> eps, bool aligned) {
  using M = DeviceMath<acc_t<T>>;
  int64_t row = blockIdx.x, set = row / n;
  SizedBox<M> box = sized_box<M, KIND, false>(load_box(boxes1 + 4 * row, aligned));
  BoxOf<M> total{}, da, db;
  for (int64_t j = threadIdx.x; j < m; j += kBoxThreads) {
    SizedBox<M> other = sized_box<M, KIND, false>(load_box(boxes2 + 4 * (set * m + j), aligned));
    box_agreement_grad<M, KIND, false>(box, other, eps, dy[row * m + j], da, db);
    total = {total.x1 + da.x1, total.y1 + da.y1, total.x2 + da.x2, total.y2 + da.y2};
  }
  PYDL_SHARED(BoxOf<M>, parts, kBoxThreads / kWarp);
  total = {warp_sum(total.x1), warp_sum(total.y1), warp_sum(total.x2), warp_sum(total.y2)};
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kBoxThreads / kWarp; ++i) {
    total = {total.x1 + parts[i].x1, total.y1 + parts[i].y1, total.x2 + parts[i].x2, total.y2 + parts[i].y2};
  }
  store_box(dboxes1 + 4 * row, total);
}

// Sums over the rows of one group for the gradient of boxes2, one thread for each box: partial [set, group, m].
template <typename T, int KIND>
__global__ void __launch_bounds__(kBoxThreads, 1)
    box_iou_columns_kernel(const acc_t<T>* __restrict__ dy, const T* __restrict__ boxes1, const T* __restrict__ boxes2,
                           acc_t<T>* __restrict__ partial, int64_t n, int64_t m, int64_t group_rows, int64_t groups,
                           int64_t column_blocks, acc_t<T> eps, bool aligned) {
  using M = DeviceMath<acc_t<T>>;
  int64_t part = blockIdx.x / column_blocks, column = blockIdx.x % column_blocks * kBoxThreads + threadIdx.x;
  if (column >= m) return;
  int64_t set = part / groups, first = part % groups * group_rows, last = min(first + group_rows, n);
  SizedBox<M> box = sized_box<M, KIND, false>(load_box(boxes2 + 4 * (set * m + column), aligned));
  BoxOf<M> total{}, da, db;
  for (int64_t i = set * n + first; i < set * n + last; ++i) {
    SizedBox<M> other = sized_box<M, KIND, false>(load_box(boxes1 + 4 * i, aligned));
    box_agreement_grad<M, KIND, false>(other, box, eps, dy[i * m + column], da, db);
    total = {total.x1 + db.x1, total.y1 + db.y1, total.x2 + db.x2, total.y2 + db.y2};
  }
  store_box(partial + 4 * (part * m + column), total);
}

template <typename T>
__global__ void __launch_bounds__(kBoxThreads, 1)
    box_iou_fold_kernel(const acc_t<T>* __restrict__ partial, T* __restrict__ dboxes2, int64_t m, int64_t groups,
                        int64_t items) {
  int64_t item = int64_t(thread_item());
  if (item >= items) return;
  partial += 4 * (item / m * groups * m + item % m);
  DeviceBox<T> total{};
  for (int64_t group = 0; group < groups; ++group, partial += 4 * m) {
    DeviceBox<T> part = load_box(partial, true);
    total = {total.x1 + part.x1, total.y1 + part.y1, total.x2 + part.x2, total.y2 + part.y2};
  }
  store_box(dboxes2 + 4 * item, total);
}

// ---- launchers

bool is_box_aligned(const BoxPairs& p) { return boxes_aligned(p.boxes1, p.dtype) && boxes_aligned(p.boxes2, p.dtype); }

template <typename T, int KIND>
void launch_forward(const BoxPairs& p, void* out, cudaStream_t stream) {
  int columns = 32;
  while (columns < kBoxThreads && columns < p.m) columns *= 2;
  int64_t row_tiles = ceil_div(p.n, int64_t(kTileRows)), column_tiles = ceil_div(p.m, int64_t(columns));
  int64_t blocks = p.batch * row_tiles * column_tiles;
  STD_TORCH_CHECK(blocks <= kMaxGridX, "box_iou_fwd: too many pairs, ", p.batch, " x ", p.n, " x ", p.m);
  PYDL_LAUNCH((box_iou_kernel<T, KIND>), unsigned(blocks), kBoxThreads, 0, stream, static_cast<const T*>(p.boxes1),
              static_cast<const T*>(p.boxes2), static_cast<acc_t<T>*>(out), p.n, p.m, columns, row_tiles, column_tiles,
              acc_t<T>(p.eps), is_box_aligned(p));
}

struct PairGradients {
  const void* dy;
  void *dboxes1, *dboxes2, *partial;
  int64_t group_rows, groups;
  cudaStream_t stream;
};

template <typename T, int KIND>
void launch_backward(const BoxPairs& p, const PairGradients& g) {
  using C = acc_t<T>;
  const T *boxes1 = static_cast<const T*>(p.boxes1), *boxes2 = static_cast<const T*>(p.boxes2);
  const C* dy = static_cast<const C*>(g.dy);
  if (p.n > 0) {
    STD_TORCH_CHECK(p.batch * p.n <= kMaxGridX, "box_iou_bwd: too many boxes, ", p.batch * p.n);
    PYDL_LAUNCH((box_iou_rows_kernel<T, KIND>), unsigned(p.batch * p.n), kBoxThreads, 0, g.stream, dy, boxes1, boxes2,
                static_cast<T*>(g.dboxes1), p.n, p.m, C(p.eps), is_box_aligned(p));
  }
  if (p.m == 0) return;
  int64_t column_blocks = ceil_div(p.m, int64_t(kBoxThreads)), blocks = p.batch * g.groups * column_blocks;
  STD_TORCH_CHECK(blocks <= kMaxGridX, "box_iou_bwd: too many boxes, ", p.batch * p.m);
  if (blocks > 0) {
    PYDL_LAUNCH((box_iou_columns_kernel<T, KIND>), unsigned(blocks), kBoxThreads, 0, g.stream, dy, boxes1, boxes2,
                static_cast<C*>(g.partial), p.n, p.m, g.group_rows, g.groups, column_blocks, C(p.eps),
                is_box_aligned(p));
  }
  PYDL_LAUNCH(box_iou_fold_kernel<T>, box_grid("box_iou_bwd", p.batch * p.m), kBoxThreads, 0, g.stream,
              static_cast<const C*>(g.partial), static_cast<T*>(g.dboxes2), p.m, g.groups, p.batch * p.m);
}

// ---- host functions

Tensor box_iou_fwd(const Tensor& boxes1_in, const Tensor& boxes2_in, int64_t kind, double eps) {
  const DeviceGuard guard(boxes1_in);
  guard.check_same("box_iou_fwd", "boxes2", boxes2_in);
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta1(boxes1), meta2(boxes2);
  const BoxPairs p = box_pairs("box_iou_fwd", meta1, meta2, kind, eps);
  const Sizes sizes = pair_sizes(p, meta1.dim);
  Output out = empty_on(guard, sizes.data(), meta1.dim, host::compute_dtype(p.dtype));
  if (p.batch * p.n * p.m == 0) return std::move(out.tensor);
  PYDL_CUDA_FLOAT_SWITCH(p.dtype, PYDL_BOX_KIND_SWITCH(kind, launch_forward<T, KIND>(p, out.data, guard.stream())));
  return std::move(out.tensor);
}

std::tuple<Tensor, Tensor> box_iou_bwd(const Tensor& dy_in, const Tensor& boxes1_in, const Tensor& boxes2_in,
                                       int64_t kind, double eps) {
  const char* const op = "box_iou_bwd";
  const DeviceGuard guard(dy_in);
  guard.check_same(op, "boxes1", boxes1_in);
  guard.check_same(op, "boxes2", boxes2_in);
  const Tensor dy = host::as_contiguous(dy_in);
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta(dy), meta1(boxes1), meta2(boxes2);
  const BoxPairs p = box_pairs(op, meta1, meta2, kind, eps);
  check_pair_gradient(op, meta, p, meta1.dim);
  Output dboxes1 = empty_on(guard, meta1.sizes, meta1.dim, p.dtype);
  Output dboxes2 = empty_on(guard, meta2.sizes, meta2.dim, p.dtype);
  const int64_t group_rows = rows_per_partial(p.n), groups = ceil_div(p.n, group_rows);
  const int64_t partial_sizes[4] = {p.batch, groups, p.m, 4};
  const Output partial = empty_on(guard, partial_sizes, 4, host::compute_dtype(p.dtype));
  if (p.batch * (p.n + p.m) > 0) {
    const PairGradients g{meta.data, dboxes1.data, dboxes2.data, partial.data, group_rows, groups, guard.stream()};
    PYDL_CUDA_FLOAT_SWITCH(p.dtype, PYDL_BOX_KIND_SWITCH(kind, launch_backward<T, KIND>(p, g)));
  }
  return {std::move(dboxes1.tensor), std::move(dboxes2.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("box_iou_fwd", TORCH_BOX(&box_iou_fwd));
  m.impl("box_iou_bwd", TORCH_BOX(&box_iou_bwd));
}

}  // namespace pydl
