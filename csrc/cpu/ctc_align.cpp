// Forced alignment: Viterbi's search over the states blank, label, blank, ..., label, blank of an item.
//
// Blanks and labels are two vectors, so that 16 states move at once: label k follows itself, blank k or label k - 1
// (unless the two are the same class), blank k follows itself or label k - 1. A step keeps three bits per label, as
// three 16-bit words for 16 labels.

#include "common/lanes.h"
#include "cpu/ctc_batch.h"

namespace pydl {

// One call.
struct CtcAlign {
  CtcInput input;
  const CtcItem* items;
  int64_t longest;     // target that fits its frames
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
  return rows + steps;
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
  uint16_t* steps;           // [T][groups][kPlanes]: blank came from a label; label from its blank; label from a label

  AlignBuffers(void* scratch, int64_t longest) {
    const int64_t row = row_size(longest);
    C* next = static_cast<C*>(scratch) + kGroup;
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

template <class C>
void prepare(const CtcItem& item, const AlignBuffers<C>& b) {
  const int64_t padded = groups_of(item.length) * kGroup;
  for (int64_t k = -kGroup; k < padded; ++k) {
    b.labels[0][k] = b.labels[1][k] = b.blanks[0][k] = b.blanks[1][k] = -kInfinity<C>;
    b.emitted[k] = b.skip[k] = -kInfinity<C>;
  }
  for (int64_t k = 1; k < item.length; ++k) {
    if (item.labels[k] != item.labels[k - 1]) b.skip[k] = 0;
  }
}

// Fills the steps; returns the buffer that holds the last frame.
template <class T, class C>
int search(const CtcInput& in, const CtcItem& item, const AlignBuffers<C>& b, const T* x) {
  const int64_t groups = groups_of(item.length);
  const C start = to_compute(x[in.blank]);
  b.blanks[0][0] = start == start ? start : -kInfinity<C>;
  if (item.length > 0) {
    const C first = to_compute(x[item.labels[0]]);
    b.labels[0][0] = first == first ? first : -kInfinity<C>;
  }
  int from = 0;
  for (int64_t t = 1; t < item.frames; ++t, from = 1 - from) {
    x += in.stride_t;
    // No path is further than label t.
    const int64_t reached = smaller(groups, t / kGroup + 1), known = smaller(item.length, reached * kGroup);
    for (int64_t k = 0; k < known; ++k) b.emitted[k] = to_compute(x[item.labels[k]]);
    const Vec<C> blank = splat(C(to_compute(x[in.blank])));
    uint16_t* steps = b.steps + t * groups * kPlanes;
    for (int64_t g = 0; g < reached; ++g) step_group(b, from, g * kGroup, blank, steps + g * kPlanes);
    if (t % kRescale == 0) rescale(b.labels[1 - from], b.blanks[1 - from], reached * kGroup);
  }
  return from;
}

// Walks back from the better of the two last states; false where neither is possible.
template <class T, class C>
bool trace(const CtcInput& in, const CtcItem& item, const AlignBuffers<C>& b, const T* x, int last, int64_t* alignment,
           C* scores) {
  const int64_t groups = groups_of(item.length);
  int64_t k = item.length;
  bool on_label = b.labels[last][k - 1] > b.blanks[last][k];
  if (on_label) --k;
  if ((on_label ? b.labels : b.blanks)[last][k] == -kInfinity<C>) return false;
  for (int64_t t = item.frames - 1;; --t) {
    alignment[t] = on_label ? item.labels[k] : in.blank;
    scores[t] = to_compute(x[t * in.stride_t + alignment[t]]);
    if (t == 0) return true;
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
  const CtcInput& in = a.input;
  const AlignBuffers<C> b(scratch, a.longest);
  for (int64_t n = begin; n < end; ++n) {
    const CtcItem& item = a.items[n];
    const T* x = static_cast<const T*>(in.x) + n * in.stride_n;
    int64_t* alignment = a.alignment + n * in.frames;
    C* scores = static_cast<C*>(a.scores) + n * in.frames;
    for (int64_t t = item.frames; t < in.frames; ++t) {
      alignment[t] = -1;
      scores[t] = 0;
    }
    a.no_path[n] = item.frames < item.length;
    if (item.frames == 0 || a.no_path[n]) continue;
    prepare(item, b);
    a.no_path[n] = !trace(in, item, b, x, search(in, item, b, x), alignment, scores);
  }
}

}  // namespace

void ctc_align_items(const CtcAlign& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.input.dtype, align_items<T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, ctc_align_items, const CtcAlign&, void*, int64_t, int64_t)

namespace {

std::tuple<Tensor, Tensor> ctc_align(const Tensor& x, const Tensor& targets, const Tensor& input_lengths,
                                     const Tensor& target_lengths, int64_t blank, int64_t) {
  const CtcBatch batch("ctc_align", x, targets, input_lengths, target_lengths, blank, false);
  const CtcInput& in = batch.input();
  const int64_t sizes[2] = {in.items, in.frames}, longest = std::min(batch.longest(), in.frames);
  Output alignment = empty(sizes, 2, Dtype::kInt64), scores = empty(sizes, 2, batch.compute());
  std::vector<uint8_t> no_path(static_cast<size_t>(in.items));
  const CtcAlign a{in,          batch.items().data(), longest, static_cast<int64_t*>(alignment.data),
                   scores.data, no_path.data()};
  const int64_t bytes = scratch_bytes(in.frames, longest, size_of(batch.compute()));
  parallel(in.items, in.frames * (longest + kGroup), [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    PYDL_CPU_DISPATCH(ctc_align_items)(a, scratch.get(), begin, end);
  });
  for (int64_t n = 0; n < in.items; ++n) {
    const CtcItem& item = batch.items()[size_t(n)];
    STD_TORCH_CHECK(!no_path[size_t(n)], "ctc_align: item ", n, " has no path: ", item.length, " labels in ",
                    item.frames, " frames");
  }
  return {std::move(scores.tensor), std::move(alignment.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("ctc_align", TORCH_BOX(&ctc_align)); }

}  // namespace
}  // namespace pydl
#endif
