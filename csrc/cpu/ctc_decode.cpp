// Greedy decoding: the best class of every frame, then repeats merged and blanks removed, in place.

#include "common/isa.h"
#include "common/lanes.h"

namespace pydl {

struct CtcGreedy {
  const void* x;  // log-probability of frame t, item n, class c at t * x_t + n * x_n + c * x_c
  int64_t x_t, x_n, x_c;
  Dtype dtype;
  int64_t frames, items, classes, blank;
  const int64_t* input_lengths;
  void* best;        // [N, T] log-probability of the best class
  int64_t* labels;   // [N, T]
  int64_t* lengths;  // [N]
  void* scores;      // [N]
};

namespace PYDL_ISA {
namespace {

template <class T>
int64_t first_nan(const T* row) {
  int64_t c = 0;
  for (auto v = to_compute(row[0]); v == v; v = to_compute(row[c])) ++c;
  return c;
}

// The first of the largest; a NaN is larger than every number. Two passes, the second one over what is in the cache and
// only as far as the maximum, are faster than one that also keeps positions.
template <class T, class C>
int64_t best_class(const T* row, int64_t classes) {
  Vec<C> most[4];
  for (Vec<C>& v : most) v = splat(-kInfinity<C>);
  Mask<C> nan = {};
  sweep<C>(classes, [&](int64_t c, int slot, auto extent) {
    const Vec<C> v = load(row + c, extent, splat(-kInfinity<C>));
    nan |= is_nan(v);
    most[slot] = max_number(v, most[slot]);
  });
  if (any<C>(nan)) return first_nan(row);
  const C best = largest(max_number(max_number(most[0], most[1]), max_number(most[2], most[3])));
  for (int64_t c = 0;; c += kLanes<C>) {
    const int64_t left = classes - c;
    const Vec<C> v = left < kLanes<C> ? load(row + c, Part{left}, splat(-kInfinity<C>)) : load(row + c);
    // No lane is larger than the best: those that are not smaller are equal.
    const uint32_t bits = ~lane_bits<C>(greater(splat(best), v)) & uint32_t((uint64_t(1) << kLanes<C>)-1);
    if (bits != 0) return c + __builtin_ctz(bits);
  }
}

template <class T, class C>
int64_t best_class_strided(const T* row, int64_t classes, int64_t stride) {
  C best = -kInfinity<C>;
  int64_t place = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const C v = to_compute(row[c * stride]);
    if (v != v) return c;
    if (v > best) {
      best = v;
      place = c;
    }
  }
  return place;
}

// Frames of all items, in the order in which they lie in memory.
template <class T, class C>
void best_classes(const CtcGreedy& a, int64_t begin, int64_t end) {
  const bool by_frame = a.x_t >= a.x_n;
  const bool vector = a.x_c == 1 && a.classes < int64_t(1) << 31;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = by_frame ? row / a.items : row % a.frames, n = by_frame ? row % a.items : row / a.frames;
    if (t >= a.input_lengths[n]) continue;
    const T* x = static_cast<const T*>(a.x) + t * a.x_t + n * a.x_n;
    const int64_t c = vector ? best_class<T, C>(x, a.classes) : best_class_strided<T, C>(x, a.classes, a.x_c);
    a.labels[n * a.frames + t] = c;
    static_cast<C*>(a.best)[n * a.frames + t] = to_compute(x[c * a.x_c]);
  }
}

template <class C>
void merge(const CtcGreedy& a, int64_t n) {
  int64_t* labels = a.labels + n * a.frames;
  const C* best = static_cast<const C*>(a.best) + n * a.frames;
  int64_t before = a.blank, count = 0;
  double score = 0;
  for (int64_t t = 0; t < a.input_lengths[n]; ++t) {
    const int64_t c = labels[t];
    score += double(best[t]);
    if (c != before && c != a.blank) labels[count++] = c;
    before = c;
  }
  for (int64_t t = count; t < a.frames; ++t) labels[t] = -1;
  a.lengths[n] = count;
  static_cast<C*>(a.scores)[n] = C(score);
}

}  // namespace

void ctc_greedy_frames(const CtcGreedy& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, best_classes<T, compute_t<T>>(a, begin, end));
}

void ctc_greedy_items(const CtcGreedy& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) a.dtype == Dtype::kDouble ? merge<double>(a, n) : merge<float>(a, n);
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0
#include "cpu/ctc_batch.h"

namespace pydl {

PYDL_CPU_DECLARE(void, ctc_greedy_frames, const CtcGreedy&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, ctc_greedy_items, const CtcGreedy&, int64_t, int64_t)

namespace {

std::tuple<Tensor, Tensor, Tensor> ctc_greedy(const Tensor& x, const std::optional<Tensor>& input_lengths,
                                              int64_t blank) {
  const char* const op = "ctc_greedy";
  const Array in(x);
  check_log_probs(op, in, blank);
  const int64_t frames = in.sizes[0], items = in.sizes[1], sizes[2] = {items, frames};
  const Sizes lengths_in = read_frames(op, input_lengths, items, frames);
  const Dtype wide = compute_dtype(in.dtype);
  Output labels = empty(sizes, 2, Dtype::kInt64), lengths = empty(sizes, 1, Dtype::kInt64);
  Output scores = empty(sizes, 1, wide);
  const Scratch best(items * frames * size_of(wide));
  const CtcGreedy a{in.data,
                    in.strides[0],
                    in.strides[1],
                    in.strides[2],
                    in.dtype,
                    frames,
                    items,
                    in.sizes[2],
                    blank,
                    lengths_in.data(),
                    best.get(),
                    static_cast<int64_t*>(labels.data),
                    static_cast<int64_t*>(lengths.data),
                    scores.data};
  parallel(frames * items, in.sizes[2],
           [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(ctc_greedy_frames)(a, begin, end); });
  parallel(items, frames, [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(ctc_greedy_items)(a, begin, end); });
  return {std::move(scores.tensor), std::move(labels.tensor), std::move(lengths.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("ctc_greedy", TORCH_BOX(&ctc_greedy)); }

}  // namespace
}  // namespace pydl
#endif
