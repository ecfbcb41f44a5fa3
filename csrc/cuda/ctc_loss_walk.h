// The recursion of CTC over the frames of one item, from both ends at once. Half of the block's threads walk alpha from
// the first frame on, the other half beta from the last one back, which is the same recursion over reversed labels.
// They meet in the middle, where the likelihood is known; then each walks on over the frames of the other.
#pragma once

#include "common/log2.h"
#include "cuda/ctc_problem.h"

namespace pydl {
namespace {

// States are base-2 logarithms. So that they stay near 0, where floats are dense, every frame's probabilities are
// multiplied by 2^-shift with one integer shift for kPeriod frames, known to both halves: alpha and beta of a frame
// then lack the same factor, the product of all frames'.
constexpr int kPeriod = 16;
constexpr int kNoLevel = -(1 << 24);  // no state is reachable, or NaN

template <typename A>
__device__ inline int level_of(A value) {
  return int(min(max(value, A(kNoLevel)), A(-kNoLevel)));
}

// Follows the largest state that counts. The level is one period old when it is used: the next shift is the drift of
// the last period plus what brings the level, as the present shift will have left it, to 0 within a period.
struct Shift {
  int now, before;
  int level = 0;

  __device__ explicit Shift(int guess) : now(guess), before(guess) {}
  __device__ void follow(int measured) {
    int next = now;
    if (measured > kNoLevel) {
      next = 2 * before - now + (3 * measured - 2 * level) / kPeriod;
      next = min(max(next, kNoLevel / 4), -kNoLevel / 4);
      level = measured;
    }
    before = now;
    now = next;
  }
};

// Where a half begins and how it goes on from frame to frame.
template <typename T>
struct Path {
  using A = acc_t<T>;
  const T* x;
  const A* lse;  // null: x holds log-probabilities
  A* row;
  int64_t x_step, lse_step, row_step;
  bool back;

  __device__ Path(const Ctc& c, const Item& item, int64_t n, bool back_, const void* lse_, void* rows) : back(back_) {
    int64_t first = back ? item.frames - 1 : 0, sign = back ? -1 : 1;
    x = static_cast<const T*>(c.x) + n * c.x_item + first * c.x_frame;
    lse = lse_ == nullptr ? nullptr : static_cast<const A*>(lse_) + first * c.items + n;
    row = rows == nullptr ? nullptr : static_cast<A*>(rows) + first * c.row_width + item.row;
    x_step = sign * c.x_frame, lse_step = lse == nullptr ? 0 : sign * c.items, row_step = sign * c.row_width;
  }
};

template <typename A, typename T>
__device__ __forceinline__ A emission(T x, A lse, A shift) {
  return (to_acc(x) - lse) * A(kLog2E) - shift;
}

// States in registers. Pair i, blank i and label i in walking order, is pair k * width + thread of the half: loads and
// stores of neighbouring threads are neighbours, and pairs beyond the labels cost nothing from 32 at a time on.
template <typename T, int K, int D, int WARPS>
struct RegisterHalf {
  using A = acc_t<T>;
  static constexpr int kDepth = D;       // frames that are loaded ahead
  static constexpr bool kLean = K >= 8;  // nothing in registers that can be read again
  static constexpr int kRowDepth = kLean ? 0 : (K == 1 ? D : 1);
  static constexpr bool kOneWarp = WARPS == 1;
  static constexpr int kPairsPerThread = K;
  static constexpr int kPairs = K * WARPS * kWarp;
  static constexpr int kThreads = 2 * WARPS * kWarp;
  static constexpr int kSlots = K * WARPS + 1;

  bool back;
  int thread;

  __device__ int lane() const { return thread % kWarp; }
  __device__ int warp() const { return thread / kWarp; }
  __device__ static int width() { return kLean ? kThreads / 2 : int(blockDim.x) / 2; }

  __device__ RegisterHalf(const Ctc& c, const Item& item, const Path<T>& path, const int* labels, A* borders)
      : back(path.back), c_(c), x_step_(path.x_step), lse_step_(path.lse_step), row_step_(path.row_step) {
    thread = int(threadIdx.x) - (back ? width() : 0);
    border_ = borders + (back ? 2 * kSlots : 0);
    if (thread == 0) border_[0] = border_[kSlots] = -INFINITY;
    blanks_ = item.labels < thread ? 0 : (item.labels - thread) / width() + 1;
    labels_ = item.labels <= thread ? 0 : (item.labels - 1 - thread) / width() + 1;
    alive_ = item.labels < warp() * kWarp ? 0 : (item.labels - warp() * kWarp) / width() + 1;
    own_labels_ = labels + (back ? item.labels - 1 - thread : thread), class_step_ = int(c.x_class);
    blank_offset_ = c.blank * class_step_;
    pair_step_ = back ? -2 * width() : 2 * width();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      int i = k * width() + thread;
      blank_[k] = i == 0 ? A(0) : A(-INFINITY);
      label_[k] = -INFINITY;
      if constexpr (!kLean) offset_[k] = blank_offset_;  // of a label that is not there
      if (k >= labels_) continue;
      const int* label = own_labels_ + k * pair_step_ / 2;
      if constexpr (!kLean) offset_[k] = *label * class_step_;
      if (i > 0 && *label == label[-label_side()]) repeats_ |= 1u << k;
    }
    x_ = path.x, lse_ = path.lse, row_ = path.row == nullptr ? nullptr : path.row + state(item.labels);
#pragma unroll
    for (int j = 0; j < D; ++j) next_lse_[j] = 0;
  }

  // Begins to load the next `count` frames; `walked` says whether there were frames before.
  __device__ void start(int count, bool walked) {
    if (alive_ == 0 || count == 0) return;
    frames_left_ = count;
    if (walked) x_ += x_step(), lse_ += lse_step();
#pragma unroll
    for (int j = 0; j < D; ++j) {
      const T* const x = load_frame(j);
#pragma unroll
      for (int k = 0; k < K; ++k) load_label(x, j, k);
    }
  }

  // The level of the blank in the first frame.
  __device__ int guess() const {
    int level = alive_ > 0 ? level_of(emission(next_blank_[0], next_lse_[0], A(0))) : 0;
    return level > kNoLevel ? level : 0;
  }

  // Of the pairs from `first` on.
  __device__ int level(int first) const {
    A top = -INFINITY;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < alive_ && k * width() + thread >= first) top = max(top, max(blank_[k], label_[k]));
    }
    return level_of(top);
  }

  // Before each frame: every warp's last label goes to the warp after it.
  __device__ void exchange() {
    if constexpr (!kOneWarp) {
      current_ = kSlots - current_;
      if (lane() == kWarp - 1) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (k < alive_) border_[current_ + k * width() / kWarp + warp() + 1] = label_[k];
        }
      }
      __syncthreads();
    }
  }

  // One frame of the own half.
  template <bool STORE>
  __device__ void advance(int slot, A shift) {
    step(slot, shift, [&](int k, A, A) {
      if constexpr (STORE) {
        if (k < blanks_) row_[k * pair_step_] = blank_[k];
        if (k < labels_) row_[k * pair_step_ + label_side()] = label_[k];
      }
    });
    if constexpr (STORE) row_ += row_step();
  }

  // For the front half after exchange() and a barrier: log2 of the sum over its states of alpha times beta.
  __device__ void publish(A* meeting, int labels) const {
    if (!back) return;
    meeting += state(labels);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < blanks_) meeting[k * pair_step_] = blank_[k];
      if (k < labels_) meeting[k * pair_step_ + label_side()] = label_[k];
    }
  }
  __device__ A join(const A* meeting, int labels, int) const {
    A sum = -INFINITY;
    if (back) return sum;
    meeting += state(labels);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= alive_) break;
      A to_blank, to_label;
      arrive(k, to_blank, to_label);
      if (k < blanks_) sum = log2_add(sum, to_blank + meeting[k * pair_step_]);
      if (k < labels_) sum = log2_add(sum, to_label + meeting[k * pair_step_ + label_side()]);
    }
    return sum;
  }

  // One frame of the other half: its states become posteriors, log2(alpha beta / p), in place.
  __device__ void start_rows(int count) {
    if (count == 0) return;
    row_ahead_ = row_;
    rows_left_ = count;
#pragma unroll
    for (int r = 0; r < kRowDepth; ++r) load_row(r);
  }
  __device__ void finish(int slot, A shift, A log2_p) {
    const int r = kRowDepth > 1 ? slot : 0;
    step(slot, shift, [&](int k, A to_blank, A to_label) {
      A* const blank = row_ + k * pair_step_;
      A* const label = blank + label_side();
      if (k < blanks_) *blank = to_blank + (kRowDepth > 0 ? stored_blank_[r][k] : *blank) - log2_p;
      if (k < labels_) *label = to_label + (kRowDepth > 0 ? stored_label_[r][k] : *label) - log2_p;
    });
    row_ += row_step();
    if constexpr (kRowDepth > 0) load_row(r);
  }

 private:
  __device__ int label_side() const { return back ? -1 : 1; }

  __device__ int64_t x_step() const { return kLean ? (back ? -c_.x_frame : c_.x_frame) : x_step_; }
  __device__ int64_t lse_step() const {
    return kLean ? (lse_ == nullptr ? 0 : back ? -c_.items : c_.items) : lse_step_;
  }
  __device__ int64_t row_step() const { return kLean ? (back ? -c_.row_width : c_.row_width) : row_step_; }

  // The thread's first blank among the states of an item with so many labels.
  __device__ int state(int labels) const { return back ? 2 * (labels - thread) : 2 * thread; }

  // Where the class of pair k's label is in a frame.
  __device__ int offset(int k) const {
    if constexpr (kLean) return own_labels_[k * pair_step_ / 2] * class_step_;
    return offset_[k];
  }

  // The sums over predecessors: of a blank, itself and the label before; of a label, itself, the blank before and, if
  // it differs from the label before, that one (Graves et al. 2006, eq. 6 and 7).
  __device__ __forceinline__ void arrive(int k, A& to_blank, A& to_label) const {
    A before = __shfl_up_sync(kFullMask, label_[k], 1);
    A border = kOneWarp ? A(-INFINITY) : border_[current_ + k * width() / kWarp + warp()];
    if (lane() == 0) before = border;
    bool repeats = repeats_ >> k & 1u;
    to_blank = log2_add(blank_[k], before);
    if constexpr (K == 1 && sizeof(A) == sizeof(float)) {
      to_label = log2_add(label_[k], blank_[k], repeats ? A(-INFINITY) : before);
    } else {
      to_label = log2_add(label_[k], repeats ? blank_[k] : to_blank);
    }
  }

  // One frame: done(k, sum over the predecessors of pair k's blank, of its label) for each pair.
  template <typename F>
  __device__ __forceinline__ void step(int slot, A shift, F done) {
    if (!kOneWarp && alive_ == 0) return;
    const A lse = next_lse_[slot], blank = emission(next_blank_[slot], lse, shift);
    const T* const x = load_frame(slot);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k > 0 && k >= alive_) break;
      A to_blank, to_label;
      arrive(k, to_blank, to_label);
      blank_[k] = to_blank + blank;
      label_[k] = k < labels_ ? to_label + emission(next_label_[slot][k], lse, shift) : A(-INFINITY);
      load_label(x, slot, k);
      done(k, to_blank, to_label);
    }
  }

  // Starts with the next frame: its blank. The labels are loaded one by one, as soon as their places are free. Behind
  // the last frame that one is loaded again, which spares the branch.
  __device__ __forceinline__ const T* load_frame(int slot) {
    const T* const x = x_;
    next_blank_[slot] = x[blank_offset_];
    if (lse_ != nullptr) next_lse_[slot] = *lse_;
    const bool more = --frames_left_ > 0;
    x_ += more ? x_step() : 0;
    lse_ += more ? lse_step() : 0;
    return x;
  }
  __device__ __forceinline__ void load_label(const T* x, int slot, int k) {
    if (!kLean || k < labels_) next_label_[slot][k] = x[offset(k)];
  }

  __device__ __forceinline__ void load_row(int r) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < blanks_) stored_blank_[r][k] = row_ahead_[k * pair_step_];
      if (k < labels_) stored_label_[r][k] = row_ahead_[k * pair_step_ + label_side()];
    }
    row_ahead_ += --rows_left_ > 0 ? row_step() : 0;
  }

  A blank_[K], label_[K];
  int offset_[kLean ? 1 : K];
  const int* own_labels_;
  unsigned repeats_ = 0;
  int blanks_, labels_, alive_;  // how many of the K pairs this thread owns, and some thread of the warp
  int class_step_, blank_offset_, pair_step_;
  A* border_;
  int current_ = 0;

  const Ctc& c_;
  int64_t x_step_, lse_step_, row_step_;
  const T* x_;
  const A* lse_;
  int frames_left_ = 0, rows_left_ = 0;
  T next_blank_[D], next_label_[D][K];
  A next_lse_[D];
  A* row_;
  const A* row_ahead_ = nullptr;
  A stored_blank_[kRowDepth + 1][K], stored_label_[kRowDepth + 1][K];
};

// What the two halves of a block share while they walk.
template <typename A>
struct Shared {
  int* levels;      // [2 halves][2][kWarp]
  int64_t* totals;  // [2]: the shifts of a half's own frames, added up
  A* meeting;
};

// The largest level of the half's states when its period began.
template <typename Half>
__device__ int half_level(const Half& half, const int* levels, int own) {
  if constexpr (Half::kOneWarp) return own;
  return __reduce_max_sync(kFullMask, half.lane() < half.width() / kWarp ? levels[half.lane()] : kNoLevel);
}

// The half's own frames. Both halves take `steps` steps; with an odd number of frames the front half rests in the last.
template <bool STORE, typename A, typename Half>
__device__ void walk_own(Half& half, const Item& item, int own, int steps, int* shifts, int* levels, int64_t* total) {
  half.start(own, false);
  Shift shift(own > 0 ? half.guess() : 0);
  if (half.thread == 0) *total = 0;
  for (int base = 0; base < steps; base += kPeriod) {
    int* const published = levels + (half.back ? 2 * kWarp : 0) + (base / kPeriod % 2) * kWarp;
    // states behind cannot reach the end in the frames that are left, but may outweigh those that can
    const int first_pair = item.labels - 1 - (item.frames - base);
    int level = __reduce_max_sync(kFullMask, half.level(first_pair));
    if (!Half::kOneWarp && half.lane() == 0) published[half.warp()] = level;
    if (half.thread == 0) {
      if (STORE) shifts[base / kPeriod] = shift.now;
      *total += int64_t(shift.now) * min(kPeriod, own - base);
    }
    for (int first = 0; first < kPeriod; first += Half::kDepth) {
#pragma unroll
      for (int j = 0; j < Half::kDepth; ++j) {
        int step = base + first + j;
        if (step >= (Half::kOneWarp ? own : steps)) break;
        half.exchange();
        if (Half::kOneWarp || step < own) half.template advance<STORE>(j, A(shift.now));
      }
    }
    shift.follow(half_level(half, published, level));
  }
}

// The other half's frames, from its last to its first, with the shifts it took.
template <typename Half, typename A>
__device__ void walk_other(Half& half, int own, int other, int steps, const int* shifts, A log2_p) {
  int period = (other - 1) / kPeriod;
  const int split = (other - 1) % kPeriod;  // step i of a period is one of the other's same period while i <= split
  auto given = [&](int i) { return other > 0 && i >= 0 ? A(shifts[i]) : A(0); };
  A shift = given(period), lower = given(period - 1);
  half.start(other, own > 0);
  half.start_rows(other);
  for (int base = 0; base < steps; base += kPeriod, --period) {
    const A after = given(period - 2);
    for (int first = 0; first < kPeriod; first += Half::kDepth) {
#pragma unroll
      for (int j = 0; j < Half::kDepth; ++j) {
        int step = base + first + j;
        if (step >= (Half::kOneWarp ? other : steps)) break;
        half.exchange();
        if (Half::kOneWarp || step < other) half.finish(j, first + j <= split ? shift : lower, log2_p);
      }
    }
    shift = lower, lower = after;
  }
}

// The item's negative log-likelihood; with STORE also its posteriors. `shifts` has 2 * periods entries.
template <bool STORE, typename Half, typename A>
__device__ A walk(Half& half, const Item& item, const Shared<A>& shared, int* shifts, int periods) {
  const int frames = item.frames, steps = frames - frames / 2;
  const int own = half.back ? steps : frames - steps, other = frames - own;
  shifts += half.back ? periods : 0;
  walk_own<STORE, A>(half, item, own, steps, shifts, shared.levels, shared.totals + (half.back ? 1 : 0));
  half.exchange();
  half.publish(shared.meeting, item.labels);
  __syncthreads();
  A sum = half.join(shared.meeting, item.labels, other);
  A top = block_reduce(sum, A(-INFINITY), [](A a, A b) { return a > b ? a : b; });
  A reference = top == A(-INFINITY) ? A(0) : top;
  double log2_p = double(reference) + log2(double(block_sum(exp2_fast(sum - reference))));
  if constexpr (STORE) {
    if (fabs(log2_p) < INFINITY)
      walk_other(half, own, other, steps, shifts + (half.back ? -periods : periods), A(log2_p));
  }
  return A(-kLn2 * (log2_p + double(shared.totals[0] + shared.totals[1])));
}

}  // namespace
}  // namespace pydl
