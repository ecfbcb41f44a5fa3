// Forced alignment: Viterbi's search over the states blank, label, blank, ..., label, blank of an item.
//
// Blanks and labels are two vectors, so that 16 states move at once: label k follows itself, blank k or label k - 1
// (unless the two are the same class), blank k follows itself or label k - 1. A step keeps three bits per label, as
// three 16-bit words for 16 labels.

#include "common/isa.h"
#include "common/lanes.h"

namespace pydl {

// One call. Lengths and labels are checked; labels of item n are labels[starts[n]], ...
struct CtcAlign {
  const void* x;  // log-probabilities of frame t, item n, class c at t * x_t + n * x_n + c * x_c
  int64_t x_t, x_n, x_c;
  Dtype dtype;
  int64_t frames, blank;
  const int64_t* labels;
  const int64_t* starts;
  const int64_t* input_lengths;
  const int64_t* target_lengths;
  int64_t longest;     // target
  int64_t* alignment;  // [N, T]
  void* scores;        // [N, T]
  uint8_t* no_path;    // [N]
};

namespace {

constexpr int64_t kGroup = 16;  // labels whose steps are one word in each plane
constexpr int64_t kPlanes = 3;
// Scores are kept relative to the best state, or long sums would lose the digits that tell paths apart. The kernel for
// GPUs does it after the same frames.
constexpr int64_t kRescale = 32;

inline int64_t groups_of(int64_t labels) { return labels / kGroup + 1; }

// Elements of a buffer for one row of states: the group before the first one holds -inf.
inline int64_t row_size(int64_t longest) { return (groups_of(longest) + 1) * kGroup; }
inline int64_t scratch_bytes(int64_t frames, int64_t longest, int64_t element) {
  const int64_t rows = 6 * row_size(longest) * element, steps = frames * groups_of(longest) * kPlanes * 2;
  return rows + row_size(longest) * 8 + steps;
}

}  // namespace

namespace PYDL_ISA {
namespace {

// Buffers for one item; rows of states start at their element 0, element -1 exists.
template <class C>
struct AlignBuffers {
  C *labels[2], *blanks[2];  // log-probability of the best path that ends in a state, of this frame and the one before
  C* emitted;                // log-probability of each label at this frame
  C* skip;                   // 0 where label k may follow label k - 1 without a blank, else -inf
  int64_t* columns;          // where the labels' classes lie in a frame
  uint16_t* steps;           // [T][groups][kPlanes]: blank came from a label; label from its blank; label from a label

  AlignBuffers(void* scratch, int64_t longest) {
    const int64_t row = row_size(longest);
    columns = static_cast<int64_t*>(scratch);
    C* next = reinterpret_cast<C*>(columns + row) + kGroup;
    C** const rows[] = {&labels[0], &labels[1], &blanks[0], &blanks[1], &emitted, &skip};
    for (C** each : rows) {
      *each = next;
      next += row;
    }
    steps = reinterpret_cast<uint16_t*>(next - kGroup);
  }
};

template <class C>
Vec<C> without_nan(Vec<C> v) {
  return max_number(v, splat(-kInfinity<C>));
}

// Frame t of one group of labels: rows of the frame before are at `from`.
template <class C>
inline void step_group(const AlignBuffers<C>& b, int from, int64_t k, Vec<C> blank, uint16_t* steps) {
  constexpr int L = kLanes<C>;
  unsigned blank_moved = 0, from_blank = 0, from_label = 0;
  for (int i = 0; i < kGroup; i += L, k += L) {
    const Vec<C> stay = load(b.labels[from] + k), before = load(b.labels[from] + k - 1), gap = load(b.blanks[from] + k);
    const Mask<C> moved = greater(before, gap), via_blank = greater(gap, stay);
    const Vec<C> near = select<C>(via_blank, gap, stay), skipped = before + load(b.skip + k);
    const Mask<C> via_label = greater(skipped, near);
    store(b.blanks[1 - from] + k, without_nan<C>(select<C>(moved, before, gap) + blank));
    store(b.labels[1 - from] + k, without_nan<C>(select<C>(via_label, skipped, near) + load(b.emitted + k)));
    blank_moved |= lane_bits<C>(moved) << i;
    from_blank |= lane_bits<C>(via_blank) << i;
    from_label |= lane_bits<C>(via_label) << i;
  }
  steps[0] = uint16_t(blank_moved);
  steps[1] = uint16_t(from_blank);
  steps[2] = uint16_t(from_label);
}

// Subtracts the best score of all states.
template <class C>
void rescale(C* labels, C* blanks, int64_t count) {
  Vec<C> most = splat(-kInfinity<C>);
  for (int64_t k = 0; k < count; k += kLanes<C>) {
    most = max_number(most, max_number(load(labels + k), load(blanks + k)));
  }
  const C best = largest(most);
  if (!(best > -kInfinity<C> && best < kInfinity<C>)) return;
  for (int64_t k = 0; k < count; k += kLanes<C>) {
    store(labels + k, load(labels + k) - splat(best));
    store(blanks + k, load(blanks + k) - splat(best));
  }
}

template <class T, class C>
void prepare(const CtcAlign& a, const AlignBuffers<C>& b, int64_t n) {
  const int64_t* labels = a.labels + a.starts[n];
  const int64_t length = a.target_lengths[n], padded = groups_of(length) * kGroup;
  for (int64_t k = -kGroup; k < padded; ++k) {
    b.labels[0][k] = b.labels[1][k] = b.blanks[0][k] = b.blanks[1][k] = -kInfinity<C>;
    b.emitted[k] = b.skip[k] = -kInfinity<C>;
  }
  for (int64_t k = 0; k < length; ++k) {
    b.columns[k] = labels[k] * a.x_c;
    if (k > 0 && labels[k] != labels[k - 1]) b.skip[k] = 0;
  }
}

// Fills the steps; returns the buffer that holds the last frame.
template <class T, class C>
int search(const CtcAlign& a, const AlignBuffers<C>& b, int64_t n) {
  const int64_t length = a.target_lengths[n], groups = groups_of(length);
  const T* x = static_cast<const T*>(a.x) + n * a.x_n;
  b.blanks[0][0] = without_nan<C>(splat(C(to_compute(x[a.blank * a.x_c]))))[0];
  if (length > 0) b.labels[0][0] = without_nan<C>(splat(C(to_compute(x[b.columns[0]]))))[0];
  int from = 0;
  for (int64_t t = 1; t < a.input_lengths[n]; ++t, from = 1 - from) {
    x += a.x_t;
    // No path is further than label t.
    const int64_t reached = smaller(groups, t / kGroup + 1), known = smaller(length, reached * kGroup);
    for (int64_t k = 0; k < known; ++k) b.emitted[k] = to_compute(x[b.columns[k]]);
    const Vec<C> blank = splat(C(to_compute(x[a.blank * a.x_c])));
    uint16_t* steps = b.steps + t * groups * kPlanes;
    for (int64_t g = 0; g < reached; ++g) step_group(b, from, g * kGroup, blank, steps + g * kPlanes);
    if (t % kRescale == 0) rescale(b.labels[1 - from], b.blanks[1 - from], reached * kGroup);
  }
  return from;
}

// Walks back from the better of the two last states.
template <class T, class C>
void trace(const CtcAlign& a, const AlignBuffers<C>& b, int64_t n, int last) {
  const int64_t length = a.target_lengths[n], groups = groups_of(length);
  const T* x = static_cast<const T*>(a.x) + n * a.x_n;
  int64_t* alignment = a.alignment + n * a.frames;
  C* scores = static_cast<C*>(a.scores) + n * a.frames;
  int64_t k = length;
  bool on_label = b.labels[last][length - 1] > b.blanks[last][length];
  if (on_label) --k;
  a.no_path[n] = (on_label ? b.labels : b.blanks)[last][k] == -kInfinity<C>;
  if (a.no_path[n]) return;
  for (int64_t t = a.input_lengths[n] - 1; t >= 0; --t) {
    alignment[t] = on_label ? a.labels[a.starts[n] + k] : a.blank;
    scores[t] = to_compute(x[t * a.x_t + alignment[t] * a.x_c]);
    if (t == 0) break;
    const uint16_t* words = b.steps + (t * groups + k / kGroup) * kPlanes;
    const auto bit = [&](int plane) { return (words[plane] >> k % kGroup & 1) != 0; };
    if (!on_label) {
      on_label = bit(0);
      k -= on_label;
    } else if (bit(2)) {
      --k;
    } else {
      on_label = !bit(1);
    }
  }
}

template <class T, class C>
void align_items(const CtcAlign& a, void* scratch, int64_t begin, int64_t end) {
  const AlignBuffers<C> b(scratch, a.longest);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t length = a.input_lengths[n];
    for (int64_t t = length; t < a.frames; ++t) {
      a.alignment[n * a.frames + t] = -1;
      static_cast<C*>(a.scores)[n * a.frames + t] = 0;
    }
    a.no_path[n] = length < a.target_lengths[n];
    if (length == 0 || a.no_path[n]) continue;
    prepare<T>(a, b, n);
    trace<T>(a, b, n, search<T>(a, b, n));
  }
}

}  // namespace

void ctc_align_items(const CtcAlign& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, align_items<T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0
#include <algorithm>

#include "cpu/ctc_arguments.h"

namespace pydl {

PYDL_CPU_DECLARE(void, ctc_align_items, const CtcAlign&, void*, int64_t, int64_t)

namespace {

using namespace host;

const char* const kOp = "ctc_align";

// The labels of all items, one item after the other.
Sizes read_labels(const Array& targets, const Sizes& lengths, int64_t blank, int64_t classes) {
  Sizes labels;
  int64_t row_start = 0;
  for (size_t n = 0; n < lengths.size(); ++n) {
    const int64_t start = targets.dim == 2 ? int64_t(n) * targets.strides[0] : row_start * targets.strides[0];
    STD_TORCH_CHECK(targets.dim == 2 || lengths[n] <= targets.sizes[0] - row_start, kOp,
                    ": the target lengths must add up to the ", targets.sizes[0], " labels of targets");
    for (int64_t k = 0; k < lengths[n]; ++k) {
      const int64_t label = integer_at(targets, start + k * targets.strides[targets.dim - 1]);
      STD_TORCH_CHECK(label >= 0 && label < classes && label != blank, kOp, ": label ", k, " of item ", int64_t(n),
                      " must be in [0, ", classes, ") and not the blank, got ", label);
      labels.push_back(label);
    }
    row_start += lengths[n];
  }
  STD_TORCH_CHECK(targets.dim == 2 || row_start == targets.sizes[0], kOp, ": the target lengths must add up to the ",
                  targets.sizes[0], " labels of targets, got ", row_start);
  return labels;
}

std::tuple<Tensor, Tensor> ctc_align(const Tensor& x, const Tensor& targets, const Tensor& input_lengths,
                                     const Tensor& target_lengths, int64_t blank, int64_t) {
  const Array in(x), rows(targets);
  check_log_probs(kOp, in, blank);
  const int64_t frames = in.sizes[0], items = in.sizes[1], classes = in.sizes[2];
  STD_TORCH_CHECK(is_integer(rows.dtype) && (rows.dim == 1 || (rows.dim == 2 && rows.sizes[0] == items)), kOp,
                  ": targets must be int32 or int64 of shape [N, S] or [sum of target_lengths]");
  const Sizes frame_counts = read_lengths(kOp, "input_lengths", input_lengths, items, frames);
  const Sizes lengths = read_lengths(kOp, "target_lengths", target_lengths, items, rows.sizes[rows.dim - 1]);
  const Sizes labels = read_labels(rows, lengths, blank, classes);
  const Dtype scores_dtype = compute_dtype(in.dtype);
  const int64_t sizes[2] = {items, frames};
  Output alignment = empty(sizes, 2, Dtype::kInt64), scores = empty(sizes, 2, scores_dtype);
  Sizes starts(lengths.size());
  int64_t longest = 0, start = 0;
  for (size_t n = 0; n < lengths.size(); ++n) {
    starts[n] = start;
    start += lengths[n];
    if (lengths[n] <= frame_counts[n]) longest = std::max(longest, lengths[n]);
  }
  std::vector<uint8_t> no_path(lengths.size());
  const CtcAlign a{in.data,
                   in.strides[0],
                   in.strides[1],
                   in.strides[2],
                   in.dtype,
                   frames,
                   blank,
                   labels.data(),
                   starts.data(),
                   frame_counts.data(),
                   lengths.data(),
                   longest,
                   static_cast<int64_t*>(alignment.data),
                   scores.data,
                   no_path.data()};
  const int64_t bytes = scratch_bytes(frames, longest, size_of(scores_dtype));
  parallel(items, frames * (longest + kGroup), [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    PYDL_CPU_DISPATCH(ctc_align_items)(a, scratch.get(), begin, end);
  });
  for (int64_t n = 0; n < items; ++n) {
    STD_TORCH_CHECK(!no_path[size_t(n)], kOp, ": item ", n, " has no path: ", lengths[size_t(n)], " labels in ",
                    frame_counts[size_t(n)], " frames");
  }
  return {std::move(scores.tensor), std::move(alignment.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("ctc_align", TORCH_BOX(&ctc_align)); }

}  // namespace
}  // namespace pydl
#endif
