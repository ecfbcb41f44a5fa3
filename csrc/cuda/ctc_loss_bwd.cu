// CTC loss backward: the dense gradient exp(log p) - sum of the posteriors of a class, written once. A warp has one
// frame of one item and up to kChunk classes; it adds equal labels in the order that the forward sorted them in, no
// atomics.
#include "common/log2.h"
#include "cuda/ctc_problem.h"

namespace pydl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 512;

struct Gradient {
  const void* dloss;
  int64_t dloss_step;
  const void* nll;
  const void* rows;  // log2 of the posterior of each state
  const void* lse;   // null: x holds log-probabilities
  const int* chain;  // positions of an item's labels, ordered by label
  void* dx;
  int64_t dx_frame, dx_item;
  int chunks, frames_per_warp;
  bool zero_infinity;
  int64_t reduction;
};

// ---- kernels

// One chunk of classes: `size` of them from `first` on.
struct Chunk {
  int first, size;
};

// tile[class] = the sum of the posteriors of the item's labels of that class: a segmented scan over the sorted labels.
template <typename A>
__device__ void add_labels(const Ctc& c, const Item& item, const Chunk& chunk, const int* chain, const A* row,
                           A* tile) {
  constexpr int kNone = -1;
  const int lane = lane_in_warp();
  A carry = 0;
  int carry_class = kNone;
  for (int base = 0; base < item.labels; base += kWarp) {
    int position = base + lane < item.labels ? chain[item.first + base + lane] : -1, own = kNone;
    if (position >= 0 && position < item.labels) {
      int64_t place = label_at(c, item, position) - chunk.first;
      if (place >= 0 && place < chunk.size) own = int(place);
    }
    if (!__any_sync(kFullMask, own != kNone)) continue;
    A sum = own != kNone ? exp2_fast(row[2 * int64_t(position) + 1]) : A(0);
    int before = __shfl_up_sync(kFullMask, own, 1);
    const unsigned heads = __ballot_sync(kFullMask, lane == 0 || before != own);
    const int start = kWarp - 1 - __clz(int(heads & ((2u << lane) - 1)));
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      A lower = __shfl_up_sync(kFullMask, sum, distance);
      if (lane - distance >= start) sum += lower;
    }
    if (start == 0 && own == carry_class) sum += carry;
    carry = __shfl_sync(kFullMask, sum, kWarp - 1);
    carry_class = __shfl_sync(kFullMask, own, kWarp - 1);
    bool last = lane == kWarp - 1 || (heads >> (lane + 1) & 1u);
    if (last && own != kNone) tile[own] = sum;
    __syncwarp();
  }
}

template <typename T>
__device__ void write_gradient(const Chunk& chunk, const T* __restrict__ x, int64_t x_class, T* __restrict__ dx,
                               acc_t<T>* tile, acc_t<T> lse, acc_t<T> scale) {
  using A = acc_t<T>;
  constexpr int kUnroll = 4;
  for (int first = lane_in_warp(); first < chunk.size; first += kUnroll * kWarp) {
    T value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int i = first + u * kWarp;
      if (i < chunk.size) value[u] = x[i * x_class];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int i = first + u * kWarp;
      if (i >= chunk.size) break;
      dx[i] = from_acc<T>(scale * (exp2_fast((to_acc(value[u]) - lse) * A(kLog2E)) - tile[i]));
      tile[i] = 0;  // for the next frame
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) > 4 ? 2 : 3) ctc_loss_bwd_kernel(Ctc c, Gradient g) {
  using A = acc_t<T>;
  PYDL_SHARED(A, tiles, kWarps * kChunk);
  uint64_t rest = blockIdx.x;
  const int64_t n = take_digit(rest, int(c.items));
  const int first_class = take_digit(rest, g.chunks) * kChunk;
  const Chunk chunk{first_class, min(kChunk, c.classes - first_class)};
  const Item item = item_of(c, n);
  const int lane = lane_in_warp(), warp = int(threadIdx.x) / kWarp;
  A* const tile = tiles + warp * kChunk;
  for (int i = lane; i < chunk.size; i += kWarp) tile[i] = 0;
  __syncwarp();
  const A nll = static_cast<const A*>(g.nll)[n];
  const bool finite = !item.bad && nll > A(-INFINITY) && nll < A(INFINITY);
  const A constant = !item.bad && nll == A(INFINITY) && g.zero_infinity ? A(0) : A(NAN);
  A scale = static_cast<const A*>(g.dloss)[n * g.dloss_step];
  if (g.reduction == kMean) scale = scale / A(c.items) / A(max(item.labels, 1));
  for (int i = 0; i < g.frames_per_warp; ++i) {
    const int64_t t = (int64_t(rest) * g.frames_per_warp + i) * kWarps + warp;
    if (t >= c.frames) return;
    T* const dx = static_cast<T*>(g.dx) + t * g.dx_frame + n * g.dx_item + chunk.first;
    if (t >= item.frames || !finite) {
      const T value = from_acc<T>(t >= item.frames ? A(0) : constant);
      for (int j = lane; j < chunk.size; j += kWarp) dx[j] = value;
      continue;
    }
    const A* const row = static_cast<const A*>(g.rows) + t * c.row_width + item.row;
    add_labels(c, item, chunk, g.chain, row, tile);
    if (c.blank >= chunk.first && c.blank < chunk.first + chunk.size) {
      A sum = 0;
      for (int64_t s = lane; s <= item.labels; s += kWarp) sum += exp2_fast(row[2 * s]);
      sum = warp_sum(sum);
      if (lane == 0) tile[c.blank - chunk.first] = sum;
    }
    __syncwarp();
    const T* const x = static_cast<const T*>(c.x) + t * c.x_frame + n * c.x_item + chunk.first * c.x_class;
    const A lse = g.lse == nullptr ? A(0) : static_cast<const A*>(g.lse)[t * c.items + n];
    write_gradient<T>(chunk, x, c.x_class, dx, tile, lse, scale);
    __syncwarp();
  }
}

// ---- launchers

template <typename T>
void launch_backward(const Ctc& c, Gradient g, cudaStream_t stream) {
  constexpr int64_t kManyFrames = 1 << 16;  // from here on a block's setup is shared by several frames
  g.chunks = ceil_div(c.classes, kChunk);
  g.frames_per_warp = c.frames * c.items * g.chunks < kManyFrames ? 1 : 4;
  const int64_t groups = ceil_div(c.frames, int64_t(kWarps * g.frames_per_warp));
  const int64_t blocks = groups * g.chunks * c.items;
  STD_TORCH_CHECK(blocks <= kMaxGridX, "ctc_loss_bwd: x has too many elements");
  PYDL_LAUNCH(ctc_loss_bwd_kernel<T>, unsigned(blocks), kThreads, 0, stream, c, g);
}

// ---- host functions

// x's own order of frames and items where it is dense either way, else contiguous.
Output empty_gradient(const DeviceGuard& guard, const Array& x) {
  const int64_t t = x.sizes[0], n = x.sizes[1], c = x.sizes[2];
  const int64_t t1 = std::max<int64_t>(t, 1), n1 = std::max<int64_t>(n, 1);
  const int64_t by_frame[3] = {n1 * c, c, 1}, by_item[3] = {c, t1 * c, 1};
  const int64_t swapped_sizes[3] = {n, t, c}, swapped_strides[3] = {x.strides[1], x.strides[0], x.strides[2]};
  Array swapped = x;
  swapped.sizes = swapped_sizes, swapped.strides = swapped_strides;
  return guard.empty_strided(x.sizes, !x.contiguous() && swapped.contiguous() ? by_item : by_frame, 3, x.dtype);
}

Tensor ctc_loss_bwd(const Tensor& dloss_in, const Tensor& x_in, const Tensor& targets, const Tensor& input_lengths,
                    const Tensor& target_lengths, const Tensor& nll_in, const Tensor& rows_in, const Tensor& lse_in,
                    const Tensor& chain_in, int64_t blank, bool logits, bool zero_infinity, int64_t reduction) {
  const char* const op = "ctc_loss_bwd";
  const DeviceGuard guard(x_in);
  const Array x(x_in), dloss(dloss_in), nll(nll_in), rows(rows_in), lse(lse_in), chain(chain_in);
  const Ctc c = make_ctc(op, guard, x, targets, input_lengths, target_lengths, blank);
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, op, ": reduction must be 0, 1 or 2, got ", reduction);
  const bool each = reduction == kNone;
  STD_TORCH_CHECK(each ? dloss.dim == 1 && dloss.sizes[0] == c.items : dloss.dim == 0, op,
                  ": dloss must have the shape of the loss");
  const Dtype acc = host::compute_dtype(x.dtype);
  const int64_t labels = Array(targets).numel(), frames = c.frames * c.items;
  auto require = [&](const char* name, const Tensor& tensor, const Array& a, Dtype dtype, int64_t size) {
    STD_TORCH_CHECK(a.dtype == dtype && a.contiguous() && a.numel() == size, op, ": ", name,
                    " must be contiguous, of dtype ", host::name_of(dtype), " and ", size, " elements");
    guard.check_same(op, name, tensor);
  };
  STD_TORCH_CHECK(dloss.dtype == acc, op, ": dloss must be of dtype ", host::name_of(acc));
  guard.check_same(op, "dloss", dloss_in);
  require("nll", nll_in, nll, acc, c.items);
  require("rows", rows_in, rows, acc, c.frames * c.row_width);
  require("lse", lse_in, lse, acc, logits ? frames : 0);
  require("chain", chain_in, chain, Dtype::kInt32, labels);
  Output dx = empty_gradient(guard, x);
  if (frames == 0) return std::move(dx.tensor);
  Gradient g{};
  g.dloss = dloss.data, g.dloss_step = each ? dloss.strides[0] : 0;
  g.nll = nll.data, g.rows = rows.data, g.lse = logits ? lse.data : nullptr;
  g.chain = static_cast<const int*>(chain.data), g.dx = dx.data;
  g.zero_infinity = zero_infinity, g.reduction = reduction;
  const Array out(dx.tensor);
  g.dx_frame = out.strides[0], g.dx_item = out.strides[1];
  PYDL_CUDA_FLOAT_SWITCH(x.dtype, launch_backward<T>(c, g, guard.stream()));
  return std::move(dx.tensor);
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("ctc_loss_bwd", TORCH_BOX(&ctc_loss_bwd)); }

}  // namespace pydl
