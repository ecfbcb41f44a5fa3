// Greedy decoding in two launches: the best class of every frame, a warp or a quarter of one per frame; then, one block
// per item, repeats merged and blanks removed by a prefix sum.
#include <algorithm>

#include "common/cuda_host.h"
#include "common/warp.h"

namespace pydl {
namespace {

using cuda_host::DeviceGuard;
using host::Array;
using host::Output;
using host::Tensor;

constexpr int kThreads = 256;

struct Greedy {
  const void* x;  // log-probability of frame t, item n, class c at t * x_t + n * x_n + c * x_c
  int64_t x_t, x_n, x_c;
  int64_t frames, items;
  int classes, blank;
  const void* input_lengths;  // null: all frames
  bool wide;                  // lengths are int64, else int32
  int* best;                  // [N, T]
  void* values;               // [N, T]
  int64_t* labels;            // [N, T]
  int64_t* lengths;           // [N]
  void* scores;               // [N]
};

// ---- kernels

// -1 where the length is out of range.
__device__ inline int64_t frames_of(const Greedy& g, int64_t n) {
  if (g.input_lengths == nullptr) return g.frames;
  int64_t frames = g.wide ? static_cast<const int64_t*>(g.input_lengths)[n]
                          : int64_t(static_cast<const int32_t*>(g.input_lengths)[n]);
  return frames < 0 || frames > g.frames ? -1 : frames;
}

template <typename C>
struct Best {
  C value;
  int at;
};

// Torch's order of argmax: NaN above all numbers, of equals the first.
template <typename C>
__device__ __forceinline__ bool comes_first(const Best<C>& a, const Best<C>& b) {
  bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan || b_nan) return a_nan && (!b_nan || a.at < b.at);
  return a.value > b.value || (a.value == b.value && a.at < b.at);
}

// LANES threads share a frame.
template <typename T, int LANES>
__global__ void __launch_bounds__(kThreads) ctc_greedy_frames_kernel(Greedy g, int64_t rows, bool by_frame) {
  using C = acc_t<T>;
  int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / LANES;
  int lane = int(threadIdx.x) % LANES;
  // Rows in the order in which they lie in memory. Lanes past the last row have nothing to read, but take part.
  int64_t t = by_frame ? row / g.items : row % g.frames, n = by_frame ? row % g.items : row / g.frames;
  bool inside = row < rows && t < frames_of(g, n);
  const T* x = static_cast<const T*>(g.x) + (inside ? t * g.x_t + n * g.x_n : 0);
  Best<C> best{C(-INFINITY), inside && lane < g.classes ? lane : 0x7fffffff};
  if (inside) {
#pragma unroll 4
    for (int c = lane; c < g.classes; c += LANES) {
      Best<C> next{to_acc(x[c * g.x_c]), c};
      if (comes_first(next, best)) best = next;
    }
  }
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    Best<C> other{__shfl_xor_sync(kFullMask, best.value, offset), __shfl_xor_sync(kFullMask, best.at, offset)};
    if (comes_first(other, best)) best = other;
  }
  if (inside && lane == 0) {
    g.best[n * g.frames + t] = best.at;
    static_cast<C*>(g.values)[n * g.frames + t] = best.value;
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads) ctc_greedy_items_kernel(Greedy g) {
  constexpr int kWarps = kThreads / kWarp;
  PYDL_SHARED(int, counts, kWarps);
  int64_t n = blockIdx.x, frames = frames_of(g, n), written = 0;
  int64_t* labels = g.labels + n * g.frames;
  const int* best = g.best + n * g.frames;
  int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  double score = 0;
  for (int64_t base = 0; base < frames; base += kThreads) {
    int64_t t = base + thread;
    int label = t < frames ? best[t] : g.blank;
    bool kept = label != g.blank && (t == 0 || label != best[t - 1]);
    if (t < frames) score += double(static_cast<const C*>(g.values)[n * g.frames + t]);
    unsigned votes = __ballot_sync(kFullMask, kept);
    __syncthreads();
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += counts[w];
      total += counts[w];
    }
    if (kept) labels[written + before] = label;
    written += total;
  }
  for (int64_t t = written + thread; t < g.frames; t += kThreads) labels[t] = -1;
  score = block_sum(score);
  if (thread == 0) {
    g.lengths[n] = written;
    static_cast<C*>(g.scores)[n] = frames < 0 ? C(NAN) : C(score);
  }
}

// ---- launchers and host functions

template <typename T>
void launch_greedy(const Greedy& g, cudaStream_t stream) {
  const int64_t rows = g.frames * g.items;
  const bool by_frame = g.x_t >= g.x_n;
  const auto grid = [&](int64_t lanes) {
    const int64_t blocks = ceil_div(rows * lanes, int64_t(kThreads));
    STD_TORCH_CHECK(blocks <= kMaxGridX, "ctc_greedy: too many frames, ", rows);
    return unsigned(blocks);
  };
  if (rows > 0 && g.classes <= 64) {
    PYDL_LAUNCH((ctc_greedy_frames_kernel<T, 8>), grid(8), kThreads, 0, stream, g, rows, by_frame);
  } else if (rows > 0) {
    PYDL_LAUNCH((ctc_greedy_frames_kernel<T, kWarp>), grid(kWarp), kThreads, 0, stream, g, rows, by_frame);
  }
  PYDL_LAUNCH(ctc_greedy_items_kernel<acc_t<T>>, unsigned(g.items), kThreads, 0, stream, g);
}

std::tuple<Tensor, Tensor, Tensor> ctc_greedy(const Tensor& x, const std::optional<Tensor>& input_lengths,
                                              int64_t blank) {
  const char* const op = "ctc_greedy";
  const DeviceGuard guard(x);
  const Array in(x);
  constexpr int64_t kLimit = int64_t(1) << 30;
  STD_TORCH_CHECK(in.dim == 3 && host::is_floating(in.dtype), op,
                  ": x must be float32, float64, float16 or bfloat16 of shape [T, N, C]");
  const int64_t frames = in.sizes[0], items = in.sizes[1], classes = in.sizes[2];
  STD_TORCH_CHECK(frames <= kLimit && items <= kLimit && classes <= kLimit, op, ": x must not exceed 2^30 along a ",
                  "dimension, got ", frames, " x ", items, " x ", classes);
  STD_TORCH_CHECK(blank >= 0 && blank < classes, op, ": blank must be in [0, ", classes, "), got ", blank);
  Greedy g{in.data, in.strides[0], in.strides[1], in.strides[2], frames, items, int(classes), int(blank)};
  if (input_lengths.has_value()) {
    const Array lengths(*input_lengths);
    guard.check_same(op, "input_lengths", *input_lengths);
    STD_TORCH_CHECK((lengths.dtype == Dtype::kInt64 || lengths.dtype == Dtype::kInt32) && lengths.dim == 1 &&
                        lengths.sizes[0] == items && lengths.contiguous(),
                    op, ": input_lengths must be int32 or int64, contiguous, of shape [", items, "]");
    g.input_lengths = lengths.data;
    g.wide = lengths.dtype == Dtype::kInt64;
  }
  const Dtype wide = host::compute_dtype(in.dtype);
  const int64_t sizes[2] = {items, frames}, strides[2] = {std::max<int64_t>(frames, 1), 1}, one = 1;
  Output labels = guard.empty_strided(sizes, strides, 2, Dtype::kInt64);
  Output lengths = guard.empty_strided(sizes, &one, 1, Dtype::kInt64);
  Output scores = guard.empty_strided(sizes, &one, 1, wide);
  const Output best = guard.empty_strided(sizes, strides, 2, Dtype::kInt32);
  const Output values = guard.empty_strided(sizes, strides, 2, wide);
  g.best = static_cast<int*>(best.data);
  g.values = values.data;
  g.labels = static_cast<int64_t*>(labels.data);
  g.lengths = static_cast<int64_t*>(lengths.data);
  g.scores = scores.data;
  if (items > 0) PYDL_CUDA_FLOAT_SWITCH(in.dtype, launch_greedy<T>(g, guard.stream()));
  return {std::move(scores.tensor), std::move(labels.tensor), std::move(lengths.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("ctc_greedy", TORCH_BOX(&ctc_greedy)); }

}  // namespace pydl
