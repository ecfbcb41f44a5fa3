// Forced alignment: Viterbi's search and the walk back along the best path, one block per item, one launch.
//
// Thread k holds blank k and label k; a label's predecessors are itself, its blank and label k - 1, a blank's are
// itself and label k - 1. A warp works ahead of its neighbours for eight frames: it also carries the eight labels
// before its own, of which one more goes wrong with each frame, so that the block meets once in eight frames. A step is
// four bits, eight steps of a label one word.
#include "cuda/ctc_problem.h"

namespace pydl {
namespace {

constexpr int kChunk = 8;             // frames between two meetings; steps in a word
constexpr int kOwn = kWarp - kChunk;  // labels that a warp answers for
// Float64 needs twice the registers.
template <typename T>
constexpr int kMaxWarps = sizeof(T) == 8 ? 16 : 32;
constexpr int kRescale = 32;  // as in the CPU kernel: then both choose the same path, rounding included
constexpr int kLongThreads = 512;

// How a state was reached.
constexpr unsigned kBlankFromLabel = 1, kLabelFromBlank = 2, kLabelFromLabel = 4;

struct Align {
  Ctc ctc;
  int64_t* alignment;  // [N, T]
  void* scores;        // [N, T]
  unsigned* steps;     // [N][ceil((T - 1) / 8)][width]
  void* rows;          // [N][4][width], only of long targets
  int64_t width;       // labels and one blank more, rounded up
};

// ---- kernels

template <typename C>
struct State {
  C blank, label;
};

template <typename C>
__device__ __forceinline__ C without_nan(C value) {
  return value > C(-INFINITY) ? value : C(-INFINITY);
}

// The next frame of blank k and label k; `before` is label k - 1. A later state is left only for a better one.
template <typename C>
__device__ __forceinline__ unsigned advance(State<C>& s, C before, bool may_skip, C blank, C label) {
  bool blank_moves = before > s.blank, via_blank = s.blank > s.label;
  C near = via_blank ? s.blank : s.label;
  bool via_label = may_skip && before > near;
  s.label = without_nan((via_label ? before : near) + label);
  s.blank = without_nan((blank_moves ? before : s.blank) + blank);
  return (blank_moves ? kBlankFromLabel : 0) | (via_blank ? kLabelFromBlank : 0) | (via_label ? kLabelFromLabel : 0);
}

template <typename C>
__device__ __forceinline__ C block_best(C value) {
  return block_reduce(value, C(-INFINITY), [](C a, C b) { return a > b ? a : b; });
}

template <typename C>
__device__ __forceinline__ bool is_finite(C value) {
  return value > C(-INFINITY) && value < C(INFINITY);
}

// What all frames of an item say when there is no path.
template <typename C>
__device__ void fill(const Align& a, int64_t n, int64_t begin, int64_t end, C score) {
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    a.alignment[n * a.ctc.frames + t] = -1;
    static_cast<C*>(a.scores)[n * a.ctc.frames + t] = score;
  }
}

// Whether the item has labels and frames to search; else it is answered. All threads of the block must call it.
template <typename C>
__device__ bool prepare(const Align& a, int64_t n, const Item& item) {
  bool bad = item.bad;
  for (int k = threadIdx.x; k < item.labels; k += blockDim.x) bad |= !is_label(a.ctc, label_at(a.ctc, item, k));
  bad = __syncthreads_or(bad);
  if (bad) {
    fill(a, n, 0, a.ctc.frames, C(NAN));
    return false;
  }
  fill(a, n, item.frames, a.ctc.frames, C(0));
  if (item.labels > item.frames) fill(a, n, 0, item.frames, C(-INFINITY));
  return item.frames > 0 && item.labels <= item.frames;
}

template <typename T>
__device__ __forceinline__ void write_frame(const Align& a, const Item& item, int64_t n, int64_t t, int k,
                                            bool on_label) {
  using C = acc_t<T>;
  const Ctc& c = a.ctc;
  int64_t label = on_label ? label_at(c, item, k) : c.blank;
  a.alignment[n * c.frames + t] = label;
  static_cast<C*>(a.scores)[n * c.frames + t] =
      to_acc(static_cast<const T*>(c.x)[t * c.x_frame + n * c.x_item + label * c.x_class]);
}

// One warp walks back from the better of the two last states. Lane i reads the words of label k - i for 32 frames; the
// walk then goes from lane to lane.
template <typename T>
__device__ void walk_back(const Align& a, const Item& item, int64_t n, State<acc_t<T>> last) {
  using C = acc_t<T>;
  int lane = lane_in_warp();
  bool on_label = last.label > last.blank;
  int k = item.labels - (on_label ? 1 : 0);
  if ((on_label ? last.label : last.blank) == C(-INFINITY)) {
    for (int64_t t = lane; t < item.frames; t += kWarp) {
      a.alignment[n * a.ctc.frames + t] = -1;
      static_cast<C*>(a.scores)[n * a.ctc.frames + t] = C(-INFINITY);
    }
    return;
  }
  int64_t chunks = ceil_div(a.ctc.frames - 1, int64_t(kChunk));
  const unsigned* steps = a.steps + n * chunks * a.width;
  constexpr int kWords = kWarp / kChunk;
  for (int64_t base = (int64_t(item.frames) - 2) / kWarp * kWarp; base >= 0 && item.frames > 1; base -= kWarp) {
    unsigned words[kWords];
    int first = k, own_k = 0;
    bool own_label = false;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      int64_t chunk = base / kChunk + w;
      bool readable = first - lane >= 0 && chunk * kChunk + 1 < item.frames;
      words[w] = readable ? steps[chunk * a.width + first - lane] : 0;
    }
#pragma unroll
    for (int i = kWarp - 1; i >= 0; --i) {  // the step into frame base + i + 1
      if (base + i + 1 >= item.frames) continue;
      if (lane == i) own_k = k, own_label = on_label;
      unsigned step = __shfl_sync(kFullMask, words[i / kChunk], first - k) >> 4 * (i % kChunk);
      bool skipped = on_label && (step & kLabelFromLabel), left_blank = !on_label && (step & kBlankFromLabel);
      if (skipped || left_blank) --k;
      on_label = on_label ? skipped || !(step & kLabelFromBlank) : left_blank;
    }
    if (base + lane + 1 < item.frames) write_frame<T>(a, item, n, base + lane + 1, own_k, own_label);
  }
  if (lane == 0) write_frame<T>(a, item, n, 0, k, on_label);
}

// Emissions of eight frames from `t`: of each label by its own thread, of the blank one frame per lane.
template <typename T>
struct Emissions {
  acc_t<T> label[kChunk], blank;
};

template <typename T>
__device__ __forceinline__ void load_emissions(Emissions<T>& e, const T* x, const Ctc& c, int64_t t, int64_t frames,
                                               int64_t label, bool has_label) {
  using C = acc_t<T>;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    bool readable = has_label && t + i < frames;
    e.label[i] = readable ? to_acc(x[(t + i) * c.x_frame + label * c.x_class]) : C(-INFINITY);
  }
  int lane = lane_in_warp();
  bool readable = lane < kChunk && t + lane < frames;
  e.blank = readable ? to_acc(x[(t + lane) * c.x_frame + int64_t(c.blank) * c.x_class]) : C(-INFINITY);
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps<T>* kWarp, 1) ctc_align_kernel(Align a) {
  using C = acc_t<T>;
  PYDL_DYN_SHARED(State<C>, met);  // states of all labels at a meeting, [kChunk + width]
  const Ctc& c = a.ctc;
  int64_t n = blockIdx.x;
  Item item = item_of(c, n);
  if (!prepare<C>(a, n, item)) return;
  int lane = lane_in_warp(), k = int(threadIdx.x) / kWarp * kOwn + lane - kChunk;
  bool owner = lane >= kChunk, has_label = k >= 0 && k < item.labels;
  int64_t label = has_label ? label_at(c, item, k) : 0;
  bool may_skip = has_label && k > 0 && label != label_at(c, item, k - 1);
  const T* x = static_cast<const T*>(c.x) + n * c.x_item;
  int64_t frames = item.frames, chunks = ceil_div(c.frames - 1, int64_t(kChunk));
  unsigned* steps = a.steps + n * chunks * a.width + k;
  State<C> state{C(-INFINITY), C(-INFINITY)};
  if (k == 0) state.blank = without_nan(to_acc(x[int64_t(c.blank) * c.x_class]));
  if (k == 0 && has_label) state.label = without_nan(to_acc(x[label * c.x_class]));
  if (threadIdx.x < kChunk) met[threadIdx.x] = {C(-INFINITY), C(-INFINITY)};
  Emissions<T> now, next;
  load_emissions(next, x, c, 1, frames, label, has_label);
  for (int64_t t = 1; t < frames; t += kChunk, steps += a.width) {
    now = next;
    load_emissions(next, x, c, t + kChunk, frames, label, has_label);
    if (t > 1) {
      if ((t - 1) % kRescale == 0) {
        C best = block_best(owner ? (state.blank > state.label ? state.blank : state.label) : C(-INFINITY));
        if (is_finite(best)) state.blank -= best, state.label -= best;
      }
      __syncthreads();
      if (owner) met[kChunk + k] = state;
      __syncthreads();
      if (!owner) state = met[kChunk + k];
    }
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      C before = __shfl_up_sync(kFullMask, state.label, 1), blank = __shfl_sync(kFullMask, now.blank, i);
      if (t + i < frames) word |= advance(state, before, may_skip, blank, now.label[i]) << 4 * i;
    }
    if (owner) *steps = word;
  }
  __syncthreads();
  if (owner) met[kChunk + k] = state;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  State<C> last{met[kChunk + item.labels].blank, met[kChunk + item.labels - 1].label};
  walk_back<T>(a, item, n, last);
}

// Targets of any length: the states of this frame and the one before are in global memory.
template <typename T>
__global__ void __launch_bounds__(kLongThreads, 1) ctc_align_long_kernel(Align a) {
  using C = acc_t<T>;
  const Ctc& c = a.ctc;
  int64_t n = blockIdx.x;
  Item item = item_of(c, n);
  if (!prepare<C>(a, n, item)) return;
  const T* x = static_cast<const T*>(c.x) + n * c.x_item;
  State<C>* rows = static_cast<State<C>*>(a.rows) + n * 2 * a.width;
  unsigned* steps = a.steps + n * ceil_div(c.frames - 1, int64_t(kChunk)) * a.width;
  for (int k = threadIdx.x; k <= item.labels; k += blockDim.x) {
    rows[k] = {C(-INFINITY), C(-INFINITY)};
    if (k == 0) rows[k].blank = without_nan(to_acc(x[int64_t(c.blank) * c.x_class]));
    if (k == 0 && item.labels > 0) rows[k].label = without_nan(to_acc(x[label_at(c, item, 0) * c.x_class]));
  }
  State<C>*from = rows, *to = rows + a.width;
  for (int64_t t = 1; t < item.frames; ++t) {
    __syncthreads();
    x += c.x_frame;
    C blank = to_acc(x[int64_t(c.blank) * c.x_class]), best = C(-INFINITY);
    unsigned* words = steps + (t - 1) / kChunk * a.width;
    int shift = 4 * int((t - 1) % kChunk);
    for (int k = threadIdx.x; k <= item.labels; k += blockDim.x) {
      int64_t label = k < item.labels ? label_at(c, item, k) : -1;
      bool may_skip = k > 0 && k < item.labels && label != label_at(c, item, k - 1);
      State<C> state = from[k];
      C emitted = label < 0 ? C(-INFINITY) : to_acc(x[label * c.x_class]);
      unsigned step = advance(state, k > 0 ? from[k - 1].label : C(-INFINITY), may_skip, blank, emitted) << shift;
      words[k] = shift == 0 ? step : words[k] | step;
      to[k] = state;
      C better = state.blank > state.label ? state.blank : state.label;
      best = better > best ? better : best;
    }
    if (t % kRescale == 0) {
      best = block_best(best);
      for (int k = threadIdx.x; k <= item.labels && is_finite(best); k += blockDim.x) {
        to[k].blank -= best;
        to[k].label -= best;
      }
    }
    State<C>* swap = from;
    from = to;
    to = swap;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  State<C> last{from[item.labels].blank, item.labels > 0 ? from[item.labels - 1].label : C(-INFINITY)};
  walk_back<T>(a, item, n, last);
}

// ---- launchers and host functions

Output scratch(const DeviceGuard& guard, int64_t count, Dtype dtype) {
  const int64_t stride = 1;
  return guard.empty_strided(&count, &stride, 1, dtype);
}

template <typename T>
void launch_align(Align& a, const DeviceGuard& guard) {
  using C = acc_t<T>;
  const int64_t items = a.ctc.items, longest = std::min<int64_t>(a.ctc.max_length, a.ctc.frames);
  const int64_t warps = ceil_div(longest + 1, int64_t(kOwn)), chunks = ceil_div(a.ctc.frames - 1, int64_t(kChunk));
  a.width = warps * kOwn;
  const Output steps = scratch(guard, items * chunks * a.width, Dtype::kInt32);
  a.steps = static_cast<unsigned*>(steps.data);
  if (warps <= kMaxWarps<T>) {
    PYDL_LAUNCH(ctc_align_kernel<T>, unsigned(items), unsigned(warps * kWarp), (kChunk + a.width) * sizeof(State<C>),
                guard.stream(), a);
    return;
  }
  const Output rows = scratch(guard, items * 4 * a.width, sizeof(C) == 8 ? Dtype::kDouble : Dtype::kFloat);
  a.rows = rows.data;
  PYDL_LAUNCH(ctc_align_long_kernel<T>, unsigned(items), kLongThreads, 0, guard.stream(), a);
}

std::tuple<Tensor, Tensor> ctc_align(const Tensor& x, const Tensor& targets, const Tensor& input_lengths,
                                     const Tensor& target_lengths, int64_t blank, int64_t longest) {
  const char* const op = "ctc_align";
  const DeviceGuard guard(x);
  const Array in(x);
  Align a{
      make_ctc(op, guard, in, targets, input_lengths, target_lengths, blank), nullptr, nullptr, nullptr, nullptr, 0};
  a.ctc.max_length = int(std::max<int64_t>(std::min<int64_t>(longest, a.ctc.max_length), 0));
  const int64_t sizes[2] = {a.ctc.items, a.ctc.frames}, strides[2] = {std::max<int64_t>(a.ctc.frames, 1), 1};
  Output alignment = guard.empty_strided(sizes, strides, 2, Dtype::kInt64);
  Output scores = guard.empty_strided(sizes, strides, 2, host::compute_dtype(in.dtype));
  a.alignment = static_cast<int64_t*>(alignment.data);
  a.scores = scores.data;
  if (a.ctc.items > 0 && a.ctc.frames > 0) PYDL_CUDA_FLOAT_SWITCH(in.dtype, launch_align<T>(a, guard));
  return {std::move(scores.tensor), std::move(alignment.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) { m.impl("ctc_align", TORCH_BOX(&ctc_align)); }

}  // namespace pydl
