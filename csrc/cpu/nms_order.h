// The host's part of non-maximum suppression: boxes in order of image, class and score, segments over threads, results.
// Included at ISA level 0 only.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "common/host.h"
#include "cpu/nms.h"

namespace pydl {
namespace {

using namespace host;

constexpr int64_t kEverything = std::numeric_limits<int64_t>::max();

struct NmsItem {
  uint64_t key;
  int64_t index;
};

// Sorts by key, equal keys in their order. Least significant byte first; bytes that all keys share cost nothing.
inline void sort_items(std::vector<NmsItem>& items, std::vector<NmsItem>& spare) {
  const size_t n = items.size();
  if (n <= 48) {
    for (size_t i = 1; i < n; ++i) {
      const NmsItem item = items[i];
      size_t j = i;
      for (; j > 0 && items[j - 1].key > item.key; --j) items[j] = items[j - 1];
      items[j] = item;
    }
    return;
  }
  std::array<std::array<int64_t, 256>, 8> counts{};
  for (const NmsItem& item : items) {
    for (size_t byte = 0; byte < 8; ++byte) ++counts[byte][item.key >> 8 * byte & 255];
  }
  spare.resize(n);
  for (size_t byte = 0; byte < 8; ++byte) {
    auto& count = counts[byte];
    if (count[items[0].key >> 8 * byte & 255] == int64_t(n)) continue;
    int64_t start = 0;
    for (int64_t& c : count) start += std::exchange(c, start);
    for (const NmsItem& item : items) spare[size_t(count[item.key >> 8 * byte & 255]++)] = item;
    items.swap(spare);
  }
}

// A key that ascends while scores descend: NaN comes first, zeros of both signs are equal.
inline uint64_t score_key(double score) {
  if (score != score) return 0;
  const uint64_t bits = std::bit_cast<uint64_t>(score + 0.0), sign = uint64_t(1) << 63;
  return bits & sign ? bits : ~(bits | sign);
}
inline uint64_t score_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f), sign = uint32_t(1) << 31;
  return bits & sign ? bits : ~(bits | sign);
}

// All boxes of a call by image, class and score. Image b has positions [b * count, b * count + valid[b]).
struct Ordered {
  int64_t images, count;
  Sizes valid;
  Sizes source;  // row of a position's box: image * count + index
  Sizes rank;    // with classes: a position's place among its image's scores
  std::vector<NmsSegment> segments;
  std::vector<uint8_t> keep;

  int64_t positions() const { return images * count; }

  // Writes the indices of an image's kept boxes by decreasing score, at most `room`; returns how many.
  int64_t write(int64_t image, int64_t* out, int64_t room) const {
    const int64_t begin = image * count, end = begin + valid[size_t(image)];
    int64_t written = 0;
    if (rank.empty()) {
      for (int64_t i = begin; i < end && written < room; ++i) {
        if (keep[size_t(i)]) out[written++] = source[size_t(i)] - begin;
      }
      return written;
    }
    Sizes kept(size_t(end - begin), -1);
    for (int64_t i = begin; i < end; ++i) {
      if (keep[size_t(i)]) kept[size_t(rank[size_t(i)])] = source[size_t(i)] - begin;
    }
    for (size_t i = 0; i < kept.size() && written < room; ++i) {
      if (kept[i] >= 0) out[written++] = kept[i];
    }
    return written;
  }

  Tensor all() const {
    int64_t kept = std::count(keep.begin(), keep.end(), uint8_t(1));
    const Output out = empty(&kept, 1, Dtype::kInt64);
    if (kept > 0) write(0, static_cast<int64_t*>(out.data), kept);
    return out.tensor;
  }

  std::tuple<Tensor, Tensor> padded(int64_t max_output) const {
    const int64_t sizes[] = {images, max_output};
    const Output indices = empty(sizes, 2, Dtype::kInt64), counts = empty(sizes, 1, Dtype::kInt64);
    for (int64_t image = 0; image < images; ++image) {
      int64_t* out = static_cast<int64_t*>(indices.data) + image * max_output;
      const int64_t written = write(image, out, max_output);
      std::fill(out + written, out + max_output, int64_t(-1));
      static_cast<int64_t*>(counts.data)[image] = written;
    }
    return {indices.tensor, counts.tensor};
  }
};

// One image: its boxes with a score above the threshold by class and score, and where its classes begin.
template <class T>
void order_image(Ordered& o, std::vector<NmsSegment>& segments, int64_t image, const T* scores, const int64_t* idxs,
                 std::optional<double> score_threshold, int64_t most) {
  const int64_t begin = image * o.count;
  std::vector<NmsItem> items, spare;
  items.reserve(size_t(o.count));
  for (int64_t i = begin; i < begin + o.count; ++i) {
    const compute_t<T> score = PYDL_ISA::to_compute(scores[i]);
    if (!score_threshold || double(score) > *score_threshold) items.push_back({score_key(score), i});
  }
  sort_items(items, spare);
  const int64_t end = begin + int64_t(items.size());
  o.valid[size_t(image)] = end - begin;
  if (idxs == nullptr) {
    for (int64_t i = begin; i < end; ++i) o.source[size_t(i)] = items[size_t(i - begin)].index;
    if (begin < end) segments.push_back({begin, end, most});
    return;
  }
  Sizes rows(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    rows[i] = items[i].index;
    items[i] = {uint64_t(idxs[rows[i]]), int64_t(i)};
  }
  sort_items(items, spare);
  for (int64_t i = begin, start = begin; i < end; ++i) {
    const NmsItem& item = items[size_t(i - begin)];
    o.rank[size_t(i)] = item.index;
    o.source[size_t(i)] = rows[size_t(item.index)];
    if (i + 1 == end || items[size_t(i + 1 - begin)].key != item.key) {
      segments.push_back({start, i + 1, most});
      start = i + 1;
    }
  }
}

// The arguments that all ops here share, made contiguous, and checked as far as memory safety needs: boxes [..., count,
// width], scores and idxs [..., count].
struct NmsArrays {
  NmsArrays(const char* op, const Tensor& boxes_in, int64_t width, const Tensor& scores_in,
            const std::optional<Tensor>& idxs_in)
      : tensors{as_contiguous(boxes_in), as_contiguous(scores_in), as_contiguous(idxs_in.value_or(scores_in))},
        boxes(tensors[0]),
        scores(tensors[1]) {
    STD_TORCH_CHECK(boxes.dim == 2 || boxes.dim == 3, op, ": boxes must have 2 or 3 dimensions, got ", boxes.dim);
    STD_TORCH_CHECK(is_floating(boxes.dtype) && is_floating(scores.dtype), op,
                    ": boxes and scores must be floating point");
    STD_TORCH_CHECK(boxes.sizes[boxes.dim - 1] == width, op, ": boxes must have ", width, " numbers each, got ",
                    boxes.sizes[boxes.dim - 1]);
    const auto matches = [&](const Array& other) {
      return other.dim == boxes.dim - 1 && std::equal(other.sizes, other.sizes + other.dim, boxes.sizes);
    };
    STD_TORCH_CHECK(matches(scores), op, ": scores must have the shape of boxes without the last dimension");
    const Array idxs(tensors[2]);
    STD_TORCH_CHECK(!idxs_in || (idxs.dtype == Dtype::kInt64 && matches(idxs)), op,
                    ": idxs must be int64 and have the shape of scores");
    classes = idxs_in ? static_cast<const int64_t*>(idxs.data) : nullptr;
    images = boxes.dim == 3 ? boxes.sizes[0] : 1;
    count = boxes.sizes[boxes.dim - 2];
  }

  const Tensor tensors[3];
  Array boxes, scores;
  const int64_t* classes;
  int64_t images, count;
};

// Every box by image, class and score; at most `most` of a segment are wanted.
inline Ordered order_by_score(const NmsArrays& in, std::optional<double> score_threshold, int64_t most) {
  Ordered o{in.images, in.count, {}, {}, {}, {}, {}};
  o.valid.resize(size_t(o.images));
  o.source.resize(size_t(o.positions()));
  o.keep.resize(size_t(o.positions()));
  if (in.classes != nullptr) o.rank.resize(size_t(o.positions()));
  std::vector<std::vector<NmsSegment>> found(size_t(o.images));
  parallel(o.images, 8 * o.count, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      PYDL_FLOAT_SWITCH(in.scores.dtype,
                        order_image(o, found[size_t(image)], image, static_cast<const T*>(in.scores.data), in.classes,
                                    score_threshold, most));
    }
  });
  for (const auto& segments : found) o.segments.insert(o.segments.end(), segments.begin(), segments.end());
  return o;
}

// The kernels of one op, at the level of this machine.
struct NmsKernels {
  void (*segment)(const NmsJob&, const NmsSegment&, char*);
  void (*begin)(const NmsJob&, const NmsSegment&, char*);
  void (*probe)(const NmsJob&, int64_t, int64_t, const char*);
  bool (*settle)(const NmsJob&, const NmsSegment&, int64_t, int64_t, char*);
};

// A long segment, block by block: threads test a block against what was kept before it, one settles it.
inline void run_shared(const NmsJob& job, const NmsSegment& segment, const NmsKernels& kernels) {
  const int64_t boxes = segment.end - segment.begin;
  const Scratch scratch(512 + nms_scratch(boxes) + nms_scratch(nms_block(boxes)));
  kernels.begin(job, segment, scratch.get<char>());
  bool more = true;
  for (int64_t start = segment.begin, stop; more && start < segment.end; start = stop) {
    stop = std::min(start + nms_block(start - segment.begin), segment.end);
    parallel(stop - start, 512,
             [&](int64_t begin, int64_t end) { kernels.probe(job, start + begin, start + end, scratch.get<char>()); });
    more = kernels.settle(job, segment, start, stop, scratch.get<char>());
  }
}

// Long segments one after the other over all threads, the others side by side.
inline void run_segments(const NmsJob& job, const std::vector<NmsSegment>& segments, const NmsKernels& kernels) {
  constexpr int64_t kLong = 16384;  // below, starting the threads costs more than they save
  const bool threads = torch::stable::get_num_threads() > 1;
  std::vector<NmsSegment> rest;
  int64_t boxes = 0, longest = 0;
  for (const NmsSegment& segment : segments) {
    const int64_t n = segment.end - segment.begin;
    if (n >= kLong && threads) {
      run_shared(job, segment, kernels);
    } else {
      rest.push_back(segment);
      boxes += n;
      longest = std::max(longest, n);
    }
  }
  const int64_t count = int64_t(rest.size());
  parallel(count, 64 * boxes / std::max<int64_t>(count, 1), [&](int64_t begin, int64_t end) {
    const Scratch scratch(nms_scratch(longest));
    for (int64_t i = begin; i < end; ++i) kernels.segment(job, rest[size_t(i)], scratch.get<char>());
  });
}

}  // namespace
}  // namespace pydl
