// Prefix beam search (Hannun et al. 2014, algorithm 1). Prefixes are nodes of a tree, of which the beam holds the best;
// a frame looks only at classes that can still enter the beam, best first, so that little of a large vocabulary is
// touched.

#include "common/isa.h"
#include "common/lanes.h"

namespace pydl {

// The classes of one frame.
struct CtcFrame {
  const void* values;
  int64_t stride, classes;
  Dtype dtype;
};

struct CtcClass {
  double value;
  int64_t label;
};

namespace PYDL_ISA {
namespace {

template <class T, class C>
int64_t classes_above(const CtcFrame& frame, int64_t begin, int64_t end, C bound, CtcClass* found) {
  const T* values = static_cast<const T*>(frame.values) + begin * frame.stride;
  int64_t count = 0;
  if (frame.stride != 1) {
    for (int64_t c = begin; c < end; ++c, values += frame.stride) {
      const C value = to_compute(*values);
      found[count] = {double(value), c};
      count += value > bound;
    }
    return count;
  }
  sweep<C>(end - begin, [&](int64_t c, int, auto extent) {
    const Vec<C> v = load(values + c, extent, splat(-kInfinity<C>));
    for (uint32_t bits = lane_bits<C>(greater(v, splat(bound))); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      found[count++] = {double(v[lane]), begin + c + lane};
    }
  });
  return count;
}

}  // namespace

// Writes those of the classes [begin, end) whose value is above `bound`, in rising order; returns how many there are.
int64_t ctc_classes_above(const CtcFrame& frame, int64_t begin, int64_t end, double bound, CtcClass* found) {
  int64_t count = 0;
  PYDL_FLOAT_SWITCH(frame.dtype,
                    count = (classes_above<T, compute_t<T>>(frame, begin, end, compute_t<T>(bound), found)));
  return count;
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/ctc_batch.h"

namespace pydl {

PYDL_CPU_DECLARE(int64_t, ctc_classes_above, const CtcFrame&, int64_t, int64_t, double, CtcClass*)

namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

double log_add(double a, double b) {
  const double high = std::max(a, b), gap = std::min(a, b) - high;
  // exp(-40) is below half a unit in the last place of 1; a gap of two infinities is NaN.
  return gap > -40 ? high + std::log1p(std::exp(gap)) : high;
}

// Log-probability of a class; NaN counts as probability zero.
double value_of(const CtcFrame& frame, int64_t c) {
  double value = 0;
  PYDL_FLOAT_SWITCH(frame.dtype,
                    value = double(PYDL_ISA::to_compute(static_cast<const T*>(frame.values)[c * frame.stride])));
  return value == value ? value : kNever;
}

struct Node {
  int32_t parent;
  int32_t place;  // in the beam, -1 outside
  int64_t label;
};

// All prefixes ever kept. Node 0 is the empty one; a node is found again by its parent and label.
class Tree {
 public:
  Tree() { clear(); }
  void clear() {
    nodes_.assign(1, {-1, -1, -1});
    table_.assign(1024, 0);
  }
  Node& operator[](int32_t node) { return nodes_[size_t(node)]; }

  int32_t child(int32_t parent, int64_t label) {
    size_t slot = start(parent, label);
    for (; table_[slot] != 0; slot = (slot + 1) & (table_.size() - 1)) {
      const Node& node = nodes_[size_t(table_[slot])];
      if (node.parent == parent && node.label == label) return table_[slot];
    }
    STD_TORCH_CHECK(nodes_.size() < size_t(std::numeric_limits<int32_t>::max()), "ctc_beam: more than 2^31 prefixes");
    const int32_t made = table_[slot] = int32_t(nodes_.size());
    nodes_.push_back({parent, -1, label});
    if (2 * nodes_.size() > table_.size()) grow();
    return made;
  }

 private:
  size_t start(int32_t parent, int64_t label) const {
    const uint64_t mixed = (uint64_t(parent) * 0x9e3779b97f4a7c15u) ^ (uint64_t(label) * 0xc2b2ae3d27d4eb4fu);
    return size_t(mixed ^ (mixed >> 29)) & (table_.size() - 1);
  }
  void grow() {
    table_.assign(2 * table_.size(), 0);
    for (size_t i = 1; i < nodes_.size(); ++i) {
      size_t slot = start(nodes_[i].parent, nodes_[i].label);
      while (table_[slot] != 0) slot = (slot + 1) & (table_.size() - 1);
      table_[slot] = int32_t(i);
    }
  }

  std::vector<Node> nodes_;
  std::vector<int32_t> table_;  // numbers of nodes, 0 for none; the size is a power of two
};

struct Prefix {
  int32_t node;
  double on_blank, on_label, total;  // of its alignments that end in the blank, of the others, of all
};

// A prefix that may be in the next beam: one of this beam, or one of them and one label more.
struct Candidate {
  double on_blank, on_label, total;
  int64_t number;  // in the order of discovery, which decides between equals
  int64_t from, label;
};

bool better(const Candidate& a, const Candidate& b) {
  return a.total > b.total || (a.total == b.total && a.number < b.number);
}

bool likelier(const CtcClass& a, const CtcClass& b) {
  return a.value > b.value || (a.value == b.value && a.label < b.label);
}

// Leaves the first `count` of the order, the last of them at the end.
template <class T, class Order>
void keep_first(std::vector<T>& values, int64_t count, Order order) {
  if (int64_t(values.size()) < count) return;
  std::nth_element(values.begin(), values.begin() + (count - 1), values.end(), order);
  values.resize(size_t(count));
}

struct CtcBeam {
  int64_t width, blank;
  double prune;
};

class Search {
 public:
  Search(const CtcBeam& beam, int64_t classes) : beam_(beam), seen_(size_t(classes), 0) {}

  void begin() {
    tree_.clear();
    tree_[0].place = 0;
    prefixes_.assign(1, {0, 0.0, kNever, 0.0});
  }

  void advance(const CtcFrame& frame) {
    if (prefixes_.empty()) return;
    next_.clear();
    threshold_ = kNever;
    link_children();
    stay(frame);
    sort_classes(frame);
    extend();
    keep_first(next_, beam_.width, better);
    std::sort(next_.begin(), next_.end(), better);
    for (const Prefix& prefix : prefixes_) tree_[prefix.node].place = -1;
    kept_.clear();
    for (const Candidate& c : next_) {
      const int32_t node = prefixes_[size_t(c.from)].node;
      kept_.push_back({c.label < 0 ? node : tree_.child(node, c.label), c.on_blank, c.on_label, c.total});
    }
    std::swap(prefixes_, kept_);
    for (size_t i = 0; i < prefixes_.size(); ++i) tree_[prefixes_[i].node].place = int32_t(i);
  }

  int64_t count() const { return int64_t(prefixes_.size()); }
  double score(int64_t k) const { return prefixes_[size_t(k)].total; }

  // Writes the labels of a prefix; returns how many there are.
  int64_t labels(int64_t k, int64_t* out) {
    int64_t length = 0;
    for (int32_t node = prefixes_[size_t(k)].node; node != 0; node = tree_[node].parent) {
      out[length++] = tree_[node].label;
    }
    std::reverse(out, out + length);
    return length;
  }

 private:
  // Candidates are sorted out when there are a few too many.
  void offer(const Candidate& c) {
    next_.push_back(c);
    if (int64_t(next_.size()) == 2 * beam_.width) choose();
  }
  void choose() {
    keep_first(next_, beam_.width, better);
    if (int64_t(next_.size()) == beam_.width) threshold_ = next_.back().total;
  }

  // Which prefixes of the beam are another one and one label more.
  void link_children() {
    first_child_.assign(prefixes_.size(), -1);
    sibling_.assign(prefixes_.size(), -1);
    for (size_t i = 0; i < prefixes_.size(); ++i) {
      const int32_t parent = tree_[prefixes_[i].node].parent, place = parent < 0 ? -1 : tree_[parent].place;
      if (place < 0) continue;
      sibling_[i] = first_child_[size_t(place)];
      first_child_[size_t(place)] = int64_t(i);
    }
  }

  // Extending by its own last label continues a label, unless a blank came between.
  double extended(const Prefix& prefix, int64_t label) {
    return tree_[prefix.node].label == label ? prefix.on_blank : prefix.total;
  }

  // Each prefix of the beam goes on: by a blank, by its last label, or reached anew from its parent in the beam.
  void stay(const CtcFrame& frame) {
    const double blank = value_of(frame, beam_.blank);
    for (size_t i = 0; i < prefixes_.size(); ++i) {
      const Prefix& prefix = prefixes_[i];
      const Node& node = tree_[prefix.node];
      Candidate c{prefix.total + blank, kNever, kNever, int64_t(i), int64_t(i), -1};
      if (prefix.node != 0) {
        const double emitted = value_of(frame, node.label);
        c.on_label = prefix.on_label + emitted;
        const int32_t parent = tree_[node.parent].place;
        if (parent >= 0 && emitted >= beam_.prune) {
          c.on_label = log_add(c.on_label, extended(prefixes_[size_t(parent)], node.label) + emitted);
        }
      }
      c.total = log_add(c.on_blank, c.on_label);
      if (c.total > kNever) offer(c);
    }
    choose();
  }

  // The classes that can lead into the beam, best first. Of 2 W + 1 at most W - 1 lead to prefixes that are in the
  // beam, one continues a label, and W fill the beam.
  void sort_classes(const CtcFrame& frame) {
    const double least = threshold_ - prefixes_[0].total;
    // A little lower, for what the bound and the sums lose by rounding.
    double bound = least > kNever ? least - 1e-6 * (1 + std::abs(least)) : kNever;
    const int64_t most = 2 * beam_.width + 1;
    classes_.clear();
    for (int64_t begin = 0; begin < frame.classes; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, frame.classes);
      const int64_t count = PYDL_CPU_DISPATCH(ctc_classes_above)(frame, begin, end, bound, found_);
      for (const CtcClass* c = found_; c < found_ + count; ++c) {
        if (c->label != beam_.blank && c->value >= beam_.prune) classes_.push_back(*c);
      }
      if (int64_t(classes_.size()) > 2 * most) {
        keep_first(classes_, most, likelier);
        bound = classes_.back().value;
      }
    }
    keep_first(classes_, most, likelier);
    std::sort(classes_.begin(), classes_.end(), likelier);
  }

  void extend() {
    int64_t number = count();
    for (size_t i = 0; i < prefixes_.size(); ++i) {
      const Prefix& prefix = prefixes_[i];
      ++mark_;
      for (int64_t q = first_child_[i]; q >= 0; q = sibling_[size_t(q)]) {
        seen_[size_t(tree_[prefixes_[size_t(q)].node].label)] = mark_;
      }
      for (const CtcClass& c : classes_) {
        if (!(prefix.total + c.value > threshold_)) break;
        if (seen_[size_t(c.label)] == mark_) continue;
        const double total = extended(prefix, c.label) + c.value;
        if (total > threshold_) offer({kNever, total, total, number++, int64_t(i), c.label});
      }
    }
  }

  static constexpr int64_t kBlock = 256;

  const CtcBeam beam_;
  Tree tree_;
  std::vector<Prefix> prefixes_, kept_;  // the beam, best first
  std::vector<Candidate> next_;
  double threshold_ = kNever;  // what a candidate must exceed
  std::vector<int64_t> first_child_, sibling_;
  std::vector<int64_t> seen_;  // mark of the last prefix that has this child in the beam
  int64_t mark_ = 0;
  CtcClass found_[kBlock];
  std::vector<CtcClass> classes_;
};

std::tuple<Tensor, Tensor, Tensor> ctc_beam(const Tensor& x, const std::optional<Tensor>& input_lengths,
                                            int64_t beam_width, int64_t blank, int64_t top_paths,
                                            double prune_log_prob) {
  const char* const op = "ctc_beam";
  const Array in(x);
  check_log_probs(op, in, blank);
  STD_TORCH_CHECK(beam_width >= 1 && beam_width < int64_t(1) << 31, op, ": beam_width must be in [1, 2^31), got ",
                  beam_width);
  STD_TORCH_CHECK(top_paths >= 1 && top_paths <= beam_width, op, ": top_paths must be in [1, ", beam_width, "], got ",
                  top_paths);
  const int64_t frames = in.sizes[0], items = in.sizes[1], classes = in.sizes[2];
  const Sizes lengths_in = read_frames(op, input_lengths, items, frames);
  const int64_t sizes[3] = {items, top_paths, frames};
  Output scores = empty(sizes, 2, compute_dtype(in.dtype));
  Output labels = empty(sizes, 3, Dtype::kInt64), lengths = empty(sizes, 2, Dtype::kInt64);
  int64_t* const labels_out = static_cast<int64_t*>(labels.data);
  std::fill(labels_out, labels_out + items * top_paths * frames, int64_t(-1));
  const CtcBeam beam{beam_width, blank, prune_log_prob};
  const char* const data = static_cast<const char*>(in.data);
  parallel(items, frames * (classes + 64 * beam_width), [&](int64_t begin, int64_t end) {
    Search search(beam, classes);
    for (int64_t n = begin; n < end; ++n) {
      search.begin();
      for (int64_t t = 0; t < lengths_in[size_t(n)]; ++t) {
        const int64_t offset = (t * in.strides[0] + n * in.strides[1]) * size_of(in.dtype);
        search.advance({data + offset, in.strides[2], classes, in.dtype});
      }
      for (int64_t i = n * top_paths, k = 0; k < top_paths; ++i, ++k) {
        const bool there = k < search.count();
        const double score = there ? search.score(k) : kNever;
        static_cast<int64_t*>(lengths.data)[i] = there ? search.labels(k, labels_out + i * frames) : 0;
        if (in.dtype == Dtype::kDouble) {
          static_cast<double*>(scores.data)[i] = score;
        } else {
          static_cast<float*>(scores.data)[i] = float(score);
        }
      }
    }
  });
  return {std::move(scores.tensor), std::move(labels.tensor), std::move(lengths.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("ctc_beam", TORCH_BOX(&ctc_beam)); }

}  // namespace
}  // namespace pydl
#endif
