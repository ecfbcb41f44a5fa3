// The recursions of the CTC loss over one item, and the memory they work in.
#pragma once

#include "common/vec_math.h"
#include "cpu/ctc_batch.h"

namespace pydl {

// Frames whose emissions are computed together, and the most between two normalisations of a row of states. A factor
// is in [1, 2) after one, and at most tripled and times sqrt(2) in a frame: a product of two remains far below 2^127.
inline constexpr int64_t kBlock = 16;

// One item and its memory. A row of states holds factors and powers of blanks, then of labels: [4][width].
struct CtcWork {
  const CtcInput* input;
  CtcItem item;
  int64_t number;     // of the item in the batch
  int64_t width;      // a multiple of every vector that is larger than the item's length
  int64_t emissions;  // rows of emissions that exist: as many as frames, or kBlock that are used again and again
  void* emission;     // [emissions][2][width]: factors and powers of the labels' probabilities
  void* blank;        // [2][emissions]
  void* skip;         // [width + 16]: 0 where label i - 1 may be followed by label i without a blank, else -inf
  void* state;        // rows of the running alpha and the running beta, then (if posteriors are wanted) of every frame
  double* offset;     // what has been subtracted from the powers of each row
  void* posterior;    // the item's first row, null if not wanted
  int64_t posterior_stride;
  void* lse;  // of the item's first frame, null if not wanted: log of the sum of exp(x - the frame's largest logit)
  double factor, power, nll;
};

namespace {  // not a member: each of the three copies must have its own
inline bool wants_posteriors(const CtcWork& work) { return work.posterior != nullptr && work.nll - work.nll == 0; }
}  // namespace

enum class CtcStage { kBegin, kAlphaToMiddle, kBetaToMiddle, kMeet, kAlphaToEnd, kBetaToBegin };

}  // namespace pydl

namespace pydl::PYDL_ISA {
namespace {

// From here to restore_subnormals, results that would be subnormal are 0: they take the processor 100 times as long,
// and beside any other term of a sum here they are nothing.
inline uint32_t flush_subnormals() {
#if defined(__x86_64__)
  const uint32_t saved = _mm_getcsr();
  _mm_setcsr(saved | _MM_FLUSH_ZERO_ON);
  return saved;
#else
  return 0;
#endif
}
inline void restore_subnormals([[maybe_unused]] uint32_t saved) {
#if defined(__x86_64__)
  _mm_setcsr(saved);
#endif
}

template <class T>
class Lattice {
 public:
  using C = compute_t<T>;
  using V = Vec<C>;
  using E = Exp<C>;
  static constexpr int L = kLanes<C>;

  explicit Lattice(CtcWork& work)
      : w_(work), in_(*work.input), width_(work.width), frames_(work.item.frames), middle_(frames_ / 2) {}

  // The rows before the first frame and after the last step.
  void begin() {
    const int64_t length = w_.item.length;
    C* skip = static_cast<C*>(w_.skip);
    for (int64_t i = 0; i < width_ + kPadding; ++i) {
      skip[i] = i > 0 && i < length && w_.item.labels[i] != w_.item.labels[i - 1] ? C(0) : -kInfinity<C>;
    }
    clear(row(kAlpha));
    row(kAlpha)[0] = 1, row(kAlpha)[width_] = 0;
    C* last = keeps() ? row(frames_ - 1) : row(kBeta);
    clear(last);
    last[length] = 1, last[width_ + length] = 0;
    if (length > 0) last[2 * width_ + length - 1] = 1, last[3 * width_ + length - 1] = 0;
    offset(kAlpha) = offset(kBeta) = 0;
    if (keeps()) offset(frames_ - 1) = 0;
  }

  // Emissions of the block that begins at frame `start`, a multiple of kBlock.
  void emit(int64_t start) {
    const int64_t count = smaller(kBlock, frames_ - start);
    C *factor = static_cast<C*>(w_.blank) + slot(start), *power = factor + w_.emissions;
    C top[kBlock] = {}, log_sum[kBlock] = {};
    for (int64_t k = 0; k < count; ++k) {
      const int64_t t = start + k;
      if (in_.logits) {
        top[k] = maximum(frame(t), in_.classes);
        log_sum[k] = log_sum_exp(frame(t), in_.classes, top[k]);
        if (w_.lse != nullptr) static_cast<C*>(w_.lse)[t * in_.items] = log_sum[k];
      }
      power[k] = (gather(t) - top[k]) - log_sum[k];
    }
    for (int64_t k = count; k < kBlock; ++k) power[k] = 0;
    split(factor, power, kBlock, 0, 0);
    for (int64_t k = 0; k < count; ++k) {
      C* p = emission(start + k);
      split(p, p + width_, width_, top[k], log_sum[k]);
    }
  }

  template <bool EMIT>
  void alpha_to_middle() {
    const C* from = row(kAlpha);
    for (int64_t t = 0; t < middle_; ++t) {
      if (EMIT && t % kBlock == 0) {
        prefetch(t + kBlock);
        emit(t);
      }
      C* to = keeps() ? row(t) : row(kAlpha);
      alpha_step(from, to, t);
      if (keeps()) offset(t) = offset(kAlpha);
      from = to;
    }
  }
  void alpha_to_end() {
    const C* from = row(middle_ > 0 ? middle_ - 1 : kAlpha);
    for (int64_t t = middle_; t < frames_; ++t) {
      alpha_step(from, row(kAlpha), t);
      from = row(kAlpha);
      posteriors(from, row(t), t, offset(kAlpha) + offset(t));
    }
  }

  // Leaves the row of frame middle - 1 in the running row.
  template <bool EMIT>
  void beta_to_middle() {
    const C* from = keeps() ? row(frames_ - 1) : row(kBeta);
    for (int64_t t = frames_ - 1; t >= middle_; --t) {
      if (EMIT && (t % kBlock == kBlock - 1 || t == frames_ - 1)) {
        const int64_t start = t / kBlock * kBlock;
        prefetch(start - kBlock);
        emit(start);
      }
      C* to = keeps() && t > middle_ ? row(t - 1) : row(kBeta);
      beta_step(from, to, t);
      if (keeps() && t > middle_) offset(t - 1) = offset(kBeta);
      from = to;
    }
  }
  void beta_to_begin() {
    for (int64_t t = middle_ - 1; t >= 0; --t) {
      posteriors(row(t), row(kBeta), t, offset(t) + offset(kBeta));
      if (t > 0) beta_step(row(kBeta), row(kBeta), t);
    }
  }

  // The likelihood, from alpha and beta of frame middle - 1.
  void meet() {
    const int64_t at = keeps() && middle_ > 0 ? middle_ - 1 : kAlpha;
    const C *a = row(at), *b = row(kBeta);
    V highest = splat(kNever);
    each([&](int64_t i) { highest = max_number(pair(a, i).power + pair(b, i).power, highest); });
    const C top = maximum<C>(highest);
    V total = {};
    each([&](int64_t i) {
      const E x = pair(a, i), y = pair(b, i);
      const V product = scale_down<C>(x.factor * y.factor, x.power + y.power - top);
      // A NaN counts unless no path leads to its state or from it.
      total += unlikely(nan_or_power(x), V{}, unlikely(nan_or_power(y), V{}, product));
    });
    w_.factor = double(sum(total));
    w_.power = double(top) + offset(at) + offset(kBeta);
    const double log_likelihood = (log2<double>(splat(w_.factor))[0] + w_.power) * 0.69314718055994530942;
    const bool impossible = top < kNever / 2 && w_.factor == w_.factor;  // NaN is passed over by `highest`
    w_.nll = impossible ? kInfinity<double> : 0 - log_likelihood;
  }

 private:
  static constexpr int64_t kAlpha = -2, kBeta = -1;  // numbers of the running rows
  static constexpr int64_t kPadding = 16;
  static constexpr int64_t kAhead = 4;  // frames between the request of memory and its use
  // The power of probability 0: sums of 17 of them still are numbers, and no other power comes near.
  static constexpr C kNever = sizeof(C) == 4 ? C(-1e36) : C(-1e300);

  bool keeps() const { return w_.posterior != nullptr; }
  C* row(int64_t t) const { return static_cast<C*>(w_.state) + (t + 2) * 4 * width_; }
  double& offset(int64_t t) const { return w_.offset[t + 2]; }
  int64_t slot(int64_t t) const { return w_.emissions == kBlock ? t % kBlock : t; }
  C* emission(int64_t t) const { return static_cast<C*>(w_.emission) + slot(t) * 2 * width_; }
  E blank(int64_t t) const {
    const C* p = static_cast<const C*>(w_.blank) + slot(t);
    return {splat(p[0]), splat(p[w_.emissions])};
  }

  E pair(const C* p, int64_t i) const { return {load(p + i), load(p + width_ + i)}; }
  void put(C* p, int64_t i, E v) const {
    store(p + i, v.factor);
    store(p + width_ + i, v.power);
  }
  // Calls f with the place of every vector of factors in a row.
  template <class F>
  void each(const F& f) const {
    for (int64_t i = 0; i < width_; i += L) f(i);
    for (int64_t i = 2 * width_; i < 3 * width_; i += L) f(i);
  }
  void clear(C* p) const {
    each([&](int64_t i) { put(p, i, never()); });
  }

  static E never() { return {V{}, splat(kNever)}; }
  static V unlikely(V power, V yes, V no) { return select<C>(greater(splat(kNever / 2), power), yes, no); }
  static V nan_or_power(E a) { return select<C>(is_nan(a.factor), a.factor, a.power); }
  static E times(E a, E b) { return {a.factor * b.factor, a.power + b.power}; }
  static E plus(E a, E b) {
    const V power = max_number(a.power, b.power);
    return {scale_down<C>(a.factor, a.power - power) + scale_down<C>(b.factor, b.power - power), power};
  }
  static E plus(E a, E b, E c) {
    const V power = max_number(max_number(a.power, b.power), c.power);
    return {scale_down<C>(a.factor, a.power - power) + scale_down<C>(b.factor, b.power - power) +
                scale_down<C>(c.factor, c.power - power),
            power};
  }
  template <int START>
  static E shift(E a, E b) {
    return {window<START>(a.factor, b.factor), window<START>(a.power, b.power)};
  }
  // Values in `power` become the factors and powers of exp(value - top - log_sum).
  static void split(C* factor, C* power, int64_t n, C top, C log_sum) {
    for (int64_t i = 0; i < n; i += L) {
      const E e = split_exp<C>((load(power + i) - top) - log_sum);
      store(factor + i, e.factor);
      store(power + i, max_number(splat(kNever), e.power));
    }
  }

  const T* frame(int64_t t) const { return static_cast<const T*>(in_.x) + t * in_.stride_t + w_.number * in_.stride_n; }

  // Asks for a block of x, where its frames are short: they lie far apart in memory.
  void prefetch(int64_t start) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (start < 0 || in_.classes > 8 * kLine) return;
    for (int64_t t = start; t < smaller(start + kBlock, frames_); ++t) {
      for (int64_t c = 0; c < in_.classes; c += kLine) __builtin_prefetch(frame(t) + c);
    }
  }

  // Puts a frame's values of the labels where their powers will be, returns the blank's.
  C gather(int64_t t) const {
    const T* x = frame(t);
    C* out = emission(t) + width_;
    const int32_t* labels = w_.item.labels;
    const int64_t length = w_.item.length;
#pragma GCC unroll 8
    for (int64_t i = 0; i < length; ++i) out[i] = to_compute(x[labels[i]]);
    for (int64_t i = length; i < width_; ++i) out[i] = -kInfinity<C>;
    return to_compute(x[in_.blank]);
  }

  // log(sum(exp(x - top))).
  static C log_sum_exp(const T* x, int64_t n, C top) {
    constexpr int64_t kSumBlock = 4096;  // elements summed one after the other before their sums are
    V total = {};
    for (int64_t start = 0; start < n; start += kSumBlock) {
      V block[4] = {};
      sweep<C>(smaller(kSumBlock, n - start), [&](int64_t i, int k, auto extent) {
        block[k] += exp<C>(load(x + start + i, extent, splat(-kInfinity<C>)) - top);
      });
      total += add_up(block);
    }
    return log2<C>(splat(sum(total)))[0] * C(0.69314718055994530942);
  }

  // to = alpha of frame t, from that of the frame before; they may be the same row.
  void alpha_step(const C* from, C* to, int64_t t) {
    const int64_t w = width_;
    const C *labels = emission(t), *skip = static_cast<const C*>(w_.skip);
    const E blanks = blank(t);
    E label = pair(from + 2 * w, w - L);
    for (int64_t i = w - L; i >= 0; i -= L) {
      const E below = i > 0 ? pair(from + 2 * w, i - L) : never();
      const E stay = pair(from, i);
      E previous = shift<L - 1>(below, label);
      put(to, i, times(plus(stay, previous), blanks));
      previous.power += load(skip + i);
      put(to + 2 * w, i, times(plus(label, stay, previous), pair(labels, i)));
      label = below;
    }
    if (t % kBlock == kBlock - 1) settle(to, offset(kAlpha));
  }

  // to = beta of frame t - 1, from that of frame t; they may be the same row. A beta does not hold its own frame's
  // probability.
  void beta_step(const C* from, C* to, int64_t t) {
    const int64_t w = width_;
    const C *labels = emission(t), *skip = static_cast<const C*>(w_.skip);
    const E blanks = blank(t);
    E stay = times(pair(from, 0), blanks), label = times(pair(from + 2 * w, 0), pair(labels, 0));
    for (int64_t i = 0; i < w; i += L) {
      const bool more = i + L < w;
      const E next_stay = more ? times(pair(from, i + L), blanks) : never();
      const E next_label = more ? times(pair(from + 2 * w, i + L), pair(labels, i + L)) : never();
      E following = shift<1>(label, next_label);
      following.power += load(skip + i + 1);
      put(to, i, plus(stay, label));
      put(to + 2 * w, i, plus(label, shift<1>(stay, next_stay), following));
      stay = next_stay, label = next_label;
    }
    if (t % kBlock == 0) settle(to, offset(kBeta));
  }

  // Brings factors back to [1, 2) and the largest power to 0.
  void settle(C* p, double& subtracted) const {
    V highest = splat(kNever);
    each([&](int64_t i) {
      const E e = normalize<C>(pair(p, i));
      put(p, i, e);
      highest = max_number(e.power, highest);
    });
    const C top = maximum<C>(highest);
    if (top < kNever / 2) return;
    each([&](int64_t i) { store(p + width_ + i, max_number(splat(kNever), load(p + width_ + i) - top)); });
    subtracted += double(top);
  }

  // log2 of the posterior of every state at frame t.
  void posteriors(const C* a, const C* b, int64_t t, double offsets) const {
    const V scale = splat(C(1 / w_.factor)), shift = splat(C(offsets - w_.power));
    C* out = static_cast<C*>(w_.posterior) + t * w_.posterior_stride;
    const int64_t n = 2 * w_.item.length + 1;
    const int64_t ahead = t < middle_ ? -kAhead : kAhead;
    if (t + ahead >= 0 && t + ahead < frames_) {
      for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(C)))
        __builtin_prefetch(out + ahead * w_.posterior_stride + i, 1);
    }
    const auto log_posterior = [&](int64_t i) {
      const E x = pair(a, i), y = pair(b, i);
      const V power = (x.power + y.power) + shift;
      return unlikely(power, splat(-kInfinity<C>), log2_normal<C>(x.factor * y.factor * scale) + power);
    };
    const auto put_out = [&](int64_t i, V v) {
      if (i + L <= n) {
        store(out + i, v);
      } else if (i < n) {
        store(out + i, v, Part{n - i});
      }
    };
    for (int64_t i = 0; 2 * i < n; i += L) {
      const V blanks = log_posterior(i), labels = log_posterior(2 * width_ + i);
      put_out(2 * i, interleave_low(blanks, labels));
      put_out(2 * i + L, interleave_high(blanks, labels));
    }
  }

  CtcWork& w_;
  const CtcInput& in_;
  const int64_t width_, frames_, middle_;
};

}  // namespace
}  // namespace pydl::PYDL_ISA
