// The states of an item in global memory, for targets of any length and classes more than 2^31 elements apart.
#pragma once

#include "cuda/ctc_loss_walk.h"

namespace pydl {
namespace {

// Same interface as RegisterHalf. `states` holds 2 x 2 rows of the item: for each half the present one and the next.
template <typename T>
struct GlobalHalf {
  using A = acc_t<T>;
  static constexpr int kDepth = 1;
  static constexpr bool kOneWarp = false;

  bool back;
  int thread;

  __device__ int lane() const { return thread % kWarp; }
  __device__ int warp() const { return thread / kWarp; }
  __device__ static int width() { return int(blockDim.x) / 2; }

  __device__ GlobalHalf(const Ctc& c, const Item& item, const Path<T>& path, A* states)
      : back(path.back), c_(c), item_(item), path_(path) {
    thread = int(threadIdx.x) - (back ? width() : 0);
    states_ = 2 * int64_t(item.labels) + 1;
    present_ = states + (back ? 2 * states_ : 0);
    meeting_ = states + 2 * states_;
    for (int64_t s = thread; s < states_; s += width()) present_[s] = s == 0 ? A(0) : A(-INFINITY);
  }

  __device__ void start(int, bool) {}

  __device__ int guess() const {
    int level = level_of(emission(path_.x[c_.blank * c_.x_class], lse(), A(0)));
    return level > kNoLevel ? level : 0;
  }

  __device__ int level(int first) const {
    A top = -INFINITY;
    for (int i = thread; i <= item_.labels; i += width()) {
      if (i < first) continue;
      top = max(top, present_[2 * int64_t(i)]);
      if (i < item_.labels) top = max(top, present_[2 * int64_t(i) + 1]);
    }
    return level_of(top);
  }

  __device__ void exchange() { __syncthreads(); }

  template <bool STORE>
  __device__ void advance(int, A shift) {
    step(shift, [&](int64_t state, A, A with) {
      if constexpr (STORE) path_.row[state] = with;
    });
  }

  __device__ void publish(A*, int) const {}

  // `other`: the frames that the back half has walked, from which follows the row its states are in.
  __device__ A join(const A*, int, int other) const {
    A sum = -INFINITY;
    if (back) return sum;
    const A* beta = meeting_ + other % 2 * states_;
    for (int i = thread; i <= item_.labels; i += width()) {
      A to_blank, to_label;
      arrive(i, to_blank, to_label);
      sum = log2_add(sum, to_blank + beta[states_ - 1 - 2 * int64_t(i)]);
      if (i < item_.labels) sum = log2_add(sum, to_label + beta[states_ - 2 - 2 * int64_t(i)]);
    }
    return sum;
  }

  __device__ void start_rows(int) {}
  __device__ void finish(int, A shift, A log2_p) {
    step(shift, [&](int64_t state, A without, A) { path_.row[state] += without - log2_p; });
  }

 private:
  __device__ A lse() const { return path_.lse == nullptr ? A(0) : *path_.lse; }

  __device__ int64_t label(int i) const { return label_at(c_, item_, back ? item_.labels - 1 - i : i); }

  __device__ void arrive(int i, A& to_blank, A& to_label) const {
    const A* own = present_ + 2 * int64_t(i);
    A before = i > 0 ? own[-1] : A(-INFINITY);
    to_blank = log2_add(own[0], before);
    to_label = -INFINITY;
    if (i == item_.labels) return;
    bool repeats = i > 0 && label(i) == label(i - 1);
    to_label = log2_add(own[1], repeats ? own[0] : to_blank);
  }

  // One frame: store(state, its sum over predecessors, that times the frame's probability) for each state.
  template <typename F>
  __device__ void step(A shift, F store) {
    A* const next = toggled();
    const A blank = emission(path_.x[c_.blank * c_.x_class], lse(), shift);
    for (int i = thread; i <= item_.labels; i += width()) {
      const int64_t state = 2 * int64_t(i), last = states_ - 1;
      A to_blank, to_label;
      arrive(i, to_blank, to_label);
      next[state] = to_blank + blank;
      store(back ? last - state : state, to_blank, next[state]);
      if (i == item_.labels) continue;
      next[state + 1] = to_label + emission(path_.x[label(i) * c_.x_class], lse(), shift);
      store(back ? last - state - 1 : state + 1, to_label, next[state + 1]);
    }
    present_ = next;
    odd_ = !odd_;
    path_.x += path_.x_step;
    if (path_.row != nullptr) path_.row += path_.row_step;
    if (path_.lse != nullptr) path_.lse += path_.lse_step;
  }

  __device__ A* toggled() const { return odd_ ? present_ - states_ : present_ + states_; }

  const Ctc& c_;
  const Item& item_;
  Path<T> path_;
  int64_t states_;
  A* present_;
  const A* meeting_;
  bool odd_ = false;
};

}  // namespace
}  // namespace pydl
