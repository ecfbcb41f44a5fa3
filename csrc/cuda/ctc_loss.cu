// CTC loss forward (Graves et al. 2006): one block per item, one launch. With a gradient wanted, the posteriors of the
// states at each frame are left in `rows`; alpha is stored for the first half of the frames and beta for the second,
// and each is finished in place by the other recursion. From logits a launch over all frames finds their logsumexp.
#include <type_traits>

#include "cuda/ctc_loss_long.h"

namespace pydl {
namespace {

// ---- kernels

struct Outputs {
  void* nll;
  void* loss;
  void* rows;
  const void* lse;
  int* chain;
  int* shifts;
  unsigned* ticket;  // zeroed: counts the items that are done
  void* states;      // of GlobalHalf
  int periods;
  int in_registers;  // the longest target whose states are held in registers, -1: none is
  bool zero_infinity;
  int64_t reduction;
};

// Whether all labels of an item are classes other than the blank. Copies them to `cache`, unless it is null.
__device__ inline bool check_labels(const Ctc& c, const Item& item, int* cache) {
  bool good = true;
  for (int i = int(threadIdx.x); i < item.labels; i += int(blockDim.x)) {
    int64_t label = label_at(c, item, i);
    good = good && is_label(c, label);
    if (cache != nullptr) cache[i] = int(label);
  }
  return __syncthreads_and(good) != 0;
}

// Positions ordered by label, for sums over equal labels in a fixed order. label(i) is the item's label i.
template <typename F>
__device__ void sort_labels(const Item& item, int* chain, F label) {
  for (int i = int(threadIdx.x); i < item.labels; i += int(blockDim.x)) {
    auto own = label(i);
    int rank = 0;
    for (int j = 0; j < item.labels; ++j) {
      auto other = label(j);
      rank += other < own || (other == own && j < i);
    }
    chain[item.first + rank] = i;
  }
}

// Stores the item's nll; the block that is the last to do so also adds up the loss, in the order of the items.
template <typename A>
__device__ void settle(const Ctc& c, const Outputs& out, int64_t n, A nll) {
  PYDL_SHARED(bool, is_last, 1);
  A* const all = static_cast<A*>(out.nll);
  A* const loss = static_cast<A*>(out.loss);
  auto counted = [&](A value) { return out.zero_infinity && value == A(INFINITY) ? A(0) : value; };
  if (threadIdx.x == 0) {
    all[n] = nll;
    if (out.reduction == kNone) {
      loss[n] = counted(nll);
    } else {
      __threadfence();
      *is_last = atomicAdd(out.ticket, 1u) == unsigned(c.items - 1);
    }
  }
  if (out.reduction == kNone) return;
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < c.items; i += blockDim.x) {
    double value = counted(__ldcg(all + i));
    int64_t length = out.reduction == kMean ? read_integer(c.target_lengths, c.wide_lengths, i) : 1;
    sum += value / double(length > 1 ? length : 1);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = A(out.reduction == kMean ? sum / double(c.items) : sum);
}

// Big is void, or what an item whose pairs do not fit into Half takes; an item that fits into neither takes GlobalHalf.
template <typename T, typename Half, typename Big, bool STORE>
__global__ void __launch_bounds__(Half::kThreads, 1) ctc_loss_kernel(Ctc c, Outputs out) {
  using A = acc_t<T>;
  using Most = std::conditional_t<std::is_void_v<Big>, Half, Big>;
  PYDL_SHARED(A, borders, 4 * Most::kSlots);
  PYDL_SHARED(int, levels, 4 * kWarp);
  PYDL_SHARED(int64_t, totals, 2);
  PYDL_DYN_SHARED(A, meeting);
  const int64_t n = blockIdx.x;
  const Item item = item_of(c, n);
  const bool in_registers = std::is_void_v<Big> || item.labels <= out.in_registers;
  int* const labels = reinterpret_cast<int*>(meeting + 2 * max(out.in_registers, 0) + 1);
  const bool good = check_labels(c, item, in_registers ? labels : nullptr) && !item.bad;
  const Shared<A> shared{levels, totals, meeting};
  auto path = [&] { return Path<T>(c, item, n, threadIdx.x >= blockDim.x / 2, out.lse, out.rows); };
  auto run = [&](auto half) {
    __syncthreads();
    return walk<STORE>(half, item, shared, STORE ? out.shifts + 2 * out.periods * n : nullptr, out.periods);
  };
  A nll;
  if (!good || item.frames == 0) {
    nll = A(!good ? NAN : (item.labels == 0 ? 0 : INFINITY));
  } else if (!in_registers) {
    if constexpr (!std::is_void_v<Big>) {
      if constexpr (STORE) sort_labels(item, out.chain, [&](int i) { return label_at(c, item, i); });
      nll = run(GlobalHalf<T>(c, item, path(), static_cast<A*>(out.states) + 4 * item.row));
    }
  } else {
    if constexpr (STORE) sort_labels(item, out.chain, [&](int i) { return labels[i]; });
    if (std::is_void_v<Big> || item.labels < Half::kPairsPerThread * int(blockDim.x) / 2) {
      nll = run(Half(c, item, path(), labels, borders));
    } else if constexpr (!std::is_void_v<Big>) {
      nll = run(Big(c, item, path(), labels, borders));
    }
  }
  settle(c, out, n, nll);
}

// The logsumexp over classes of each frame that belongs to an item: a warp per frame, or a block where C is large.
template <typename T, int THREADS>
__global__ void __launch_bounds__(256, 1) ctc_lse_kernel(Ctc c, acc_t<T>* lse) {
  using A = acc_t<T>;
  constexpr int kUnroll = 4;
  const int64_t frame = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / THREADS;
  if (frame >= c.frames * c.items) return;
  const int64_t t = frame / c.items, n = frame - t * c.items;
  if (t >= read_integer(c.input_lengths, c.wide_inputs, n)) return;
  const T* const x = static_cast<const T*>(c.x) + t * c.x_frame + n * c.x_item;
  A top = -INFINITY, sum = 0;
  for (int first = int(threadIdx.x) % THREADS; first < c.classes; first += THREADS * kUnroll) {
    A value[kUnroll], higher = top;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int i = first + u * THREADS;
      value[u] = i < c.classes ? to_acc(x[i * c.x_class]) : A(-INFINITY);
      higher = max(higher, value[u]);
    }
    const A reference = higher == A(-INFINITY) ? A(0) : higher;
    sum *= exp2_fast((top - reference) * A(kLog2E));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum += exp2_fast((value[u] - reference) * A(kLog2E));
    top = higher;
  }
  auto larger = [](A a, A b) { return a > b ? a : b; };
  A all = THREADS == kWarp ? warp_reduce(top, larger) : block_reduce(top, A(-INFINITY), larger);
  const A reference = all == A(-INFINITY) ? A(0) : all;
  sum *= exp2_fast((top - reference) * A(kLog2E));
  sum = THREADS == kWarp ? warp_sum(sum) : block_sum(sum);
  if (threadIdx.x % THREADS == 0) lse[frame] = reference + log(sum);
}

// ---- launchers

// The longest target whose states are held in registers; -1 where offsets of classes do not fit into 32 bits.
int register_length(const Ctc& c, bool wide) {
  const int64_t limit = (int64_t(1) << 31) - 1;
  if (c.classes > 1 && std::abs(c.x_class) > limit / (c.classes - 1)) return -1;
  return std::min(c.max_length, (wide ? 1024 : 2048) - 1);
}

struct Forward {
  Ctc c;
  Outputs out;
  void* lse;  // null: x holds log-probabilities
  bool with_rows;
  cudaStream_t stream;
};

template <typename T, typename Half, typename Big, bool STORE>
void launch_half(const Forward& f) {
  const int longest = std::max(0, f.out.in_registers);
  const int warps = std::min(ceil_div(longest + 1, Half::kPairsPerThread * kWarp), Half::kThreads / 2 / kWarp);
  const size_t bytes = (2 * longest + 1) * sizeof(acc_t<T>) + longest * sizeof(int);
  PYDL_LAUNCH((ctc_loss_kernel<T, Half, Big, STORE>), unsigned(f.c.items), unsigned(2 * warps * kWarp), bytes, f.stream,
              f.c, f.out);
}

// Few labels leave registers to load frames far ahead.
template <typename T, bool STORE>
void launch_walk(const Forward& f) {
  constexpr bool kWide = sizeof(T) > sizeof(float);
  using One = RegisterHalf<T, 1, kWide ? 4 : 8, 1>;
  using Few = RegisterHalf<T, 1, kWide ? 4 : 8, 4>;
  using Some = RegisterHalf<T, 2, kWide ? 2 : 4, kWide ? 4 : 8>;
  using Many = RegisterHalf<T, 8, 1, kWide ? 4 : 8>;
  const bool any_register = f.out.in_registers >= 0;
  if (any_register && f.c.max_length < One::kPairs) return launch_half<T, One, void, STORE>(f);
  if (any_register && f.c.max_length < Few::kPairs) return launch_half<T, Few, void, STORE>(f);
  launch_half<T, Some, Many, STORE>(f);
}

template <typename T>
void launch_forward(const Forward& f) {
  const int64_t frames = f.c.frames * f.c.items;
  if (f.lse != nullptr && frames > 0) {
    constexpr int kBlock = 256, kFramesPerBlock = kBlock / kWarp;
    acc_t<T>* const lse = static_cast<acc_t<T>*>(f.lse);
    const int64_t blocks = f.c.classes <= 4 * kBlock ? ceil_div(frames, int64_t(kFramesPerBlock)) : frames;
    STD_TORCH_CHECK(blocks <= kMaxGridX, "ctc_loss: too many frames, ", frames);
    if (f.c.classes <= 4 * kBlock) {
      PYDL_LAUNCH((ctc_lse_kernel<T, kWarp>), unsigned(blocks), kBlock, 0, f.stream, f.c, lse);
    } else {
      PYDL_LAUNCH((ctc_lse_kernel<T, kBlock>), unsigned(blocks), kBlock, 0, f.stream, f.c, lse);
    }
  }
  f.with_rows ? launch_walk<T, true>(f) : launch_walk<T, false>(f);
}

// ---- host functions

struct Results {
  Output loss, nll, rows, lse, chain;
};

Output vector_of(const DeviceGuard& guard, int64_t size, Dtype dtype) {
  const int64_t one = 1;
  return guard.empty_strided(&size, &one, 1, dtype);
}

Output frames_of(const DeviceGuard& guard, const Ctc& c, bool wanted, Dtype dtype) {
  const int64_t sizes[2] = {c.frames, c.items}, strides[2] = {std::max<int64_t>(c.items, 1), 1};
  return wanted ? guard.empty_strided(sizes, strides, 2, dtype) : vector_of(guard, 0, dtype);
}

Results run_forward(const char* op, const Tensor& x, const Tensor& targets, const Tensor& input_lengths,
                    const Tensor& target_lengths, int64_t blank, int64_t max_length, bool logits, bool zero_infinity,
                    int64_t reduction, bool with_rows) {
  const Array meta(x);
  const DeviceGuard guard(x);
  Ctc c = make_ctc(op, guard, meta, targets, input_lengths, target_lengths, blank);
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, op, ": reduction must be 0, 1 or 2, got ", reduction);
  STD_TORCH_CHECK(max_length >= 0, op, ": max_length must not be negative, got ", max_length);
  c.max_length = int(std::min<int64_t>(c.max_length, max_length));
  const Dtype acc = host::compute_dtype(meta.dtype);
  const int64_t labels = with_rows ? Array(targets).numel() : 0, one = 1;
  Results r{reduction == kNone ? vector_of(guard, c.items, acc) : guard.empty_strided(&one, &one, 0, acc),
            vector_of(guard, c.items, acc), vector_of(guard, with_rows ? c.frames * c.row_width : 0, acc),
            frames_of(guard, c, logits, acc), vector_of(guard, labels, Dtype::kInt32)};
  if (c.items == 0) {
    const size_t bytes = reduction == kNone ? 0 : size_t(host::size_of(acc));
    if (bytes > 0) guard.fill_bytes(r.loss.data, reduction == kMean ? 0xff : 0, bytes);
    return r;
  }
  const int64_t periods = with_rows ? ceil_div<int64_t>(c.frames, 2 * kPeriod) : 0;
  const Output work = vector_of(guard, 1 + 2 * periods * c.items, Dtype::kInt32);
  const int in_registers = register_length(c, acc == Dtype::kDouble);
  const Output states = vector_of(guard, c.max_length > in_registers ? 4 * c.row_width : 0, acc);
  if (reduction != kNone) guard.fill_bytes(work.data, 0, sizeof(int));
  Forward f{c, {}, logits ? r.lse.data : nullptr, with_rows, guard.stream()};
  f.out.nll = r.nll.data, f.out.loss = r.loss.data, f.out.rows = with_rows ? r.rows.data : nullptr;
  f.out.lse = f.lse, f.out.chain = static_cast<int*>(r.chain.data), f.out.states = states.data;
  f.out.ticket = static_cast<unsigned*>(work.data), f.out.shifts = static_cast<int*>(work.data) + 1;
  f.out.periods = int(periods), f.out.in_registers = in_registers;
  f.out.zero_infinity = zero_infinity, f.out.reduction = reduction;
  PYDL_CUDA_FLOAT_SWITCH(meta.dtype, launch_forward<T>(f));
  return r;
}

Tensor ctc_loss_value(const Tensor& x, const Tensor& targets, const Tensor& input_lengths, const Tensor& target_lengths,
                      int64_t blank, int64_t max_length, bool logits, bool zero_infinity, int64_t reduction) {
  Results r = run_forward("ctc_loss_value", x, targets, input_lengths, target_lengths, blank, max_length, logits,
                          zero_infinity, reduction, false);
  return std::move(r.loss.tensor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ctc_loss_fwd(const Tensor& x, const Tensor& targets,
                                                                const Tensor& input_lengths,
                                                                const Tensor& target_lengths, int64_t blank,
                                                                int64_t max_length, bool logits, bool zero_infinity,
                                                                int64_t reduction) {
  Results r = run_forward("ctc_loss_fwd", x, targets, input_lengths, target_lengths, blank, max_length, logits,
                          zero_infinity, reduction, true);
  return {std::move(r.loss.tensor), std::move(r.nll.tensor), std::move(r.rows.tensor), std::move(r.lse.tensor),
          std::move(r.chain.tensor)};
}

}  // namespace

PYDL_CUDA_LIBRARY_IMPL(m) {
  m.impl("ctc_loss_value", TORCH_BOX(&ctc_loss_value));
  m.impl("ctc_loss_fwd", TORCH_BOX(&ctc_loss_fwd));
}

}  // namespace pydl
