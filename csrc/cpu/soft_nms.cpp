// Soft-NMS (Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", 2017): the best box is taken,
// the scores of those that overlap it decay, and so on. Each sweep over the boxes decays and finds the next best at
// once.
#include "cpu/soft_nms.h"

#include "cpu/nms_iou.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

// Boxes still in play, in the order they were given; NaN is the score of one that has left it.
template <class C>
struct Players {
  C *x1, *y1, *x2, *y2, *area, *score;
  int64_t *index, *classes;
  int64_t count;

  void cut(char* memory, int64_t n) {
    const int64_t room = soft_nms_room(n);
    C** const planes[] = {&x1, &y1, &x2, &y2, &area, &score};
    for (C** plane : planes) {
      *plane = reinterpret_cast<C*>(memory);
      memory += room * int64_t(sizeof(C));
    }
    index = reinterpret_cast<int64_t*>(memory);
    classes = index + room;
  }

  void move(int64_t to, int64_t from) {
    C* const planes[] = {x1, y1, x2, y2, area, score};
    for (C* plane : planes) plane[to] = plane[from];
    index[to] = index[from];
    classes[to] = classes[from];
  }

  // Fills the last vector with boxes that are out of play.
  void fill() {
    for (int64_t i = count; i % kLanes<C> != 0; ++i) {
      x1[i] = y1[i] = x2[i] = y2[i] = area[i] = 0;
      classes[i] = 0;
      score[i] = C(__builtin_nan(""));
    }
  }

  // Closes the gaps of those out of play; returns the new place of a box that is in play.
  int64_t close_gaps(int64_t place) {
    int64_t kept = 0, moved = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i == place) moved = kept;
      if (score[i] == score[i]) move(kept++, i);
    }
    count = kept;
    fill();
    return moved;
  }
};

template <class C>
void load_players(const SoftNmsJob& job, Players<C>& p) {
  p.count = 0;
  for (int64_t i = 0; i < job.count; ++i) {
    const C score = number<C>(job.scores, job.score_dtype, i);
    if (!(score >= C(job.score_threshold))) continue;
    const int64_t at = p.count++;
    p.x1[at] = number<C>(job.boxes, job.box_dtype, 4 * i);
    p.y1[at] = number<C>(job.boxes, job.box_dtype, 4 * i + 1);
    p.x2[at] = number<C>(job.boxes, job.box_dtype, 4 * i + 2);
    p.y2[at] = number<C>(job.boxes, job.box_dtype, 4 * i + 3);
    p.area[at] = area_of(p.x1[at], p.y1[at], p.x2[at], p.y2[at]);
    p.score[at] = score;
    p.index[at] = i;
    p.classes[at] = job.classes != nullptr ? job.classes[i] : 0;
  }
  p.fill();
}

// The place of the highest score in play, the first of equal ones, and how many are in play.
struct Next {
  int64_t place, players;
};

template <class C>
struct Search {
  Vec<C> score = splat(-kInfinity<C>);
  IntVec<C> place = splat(int_t<C>(-1));
  int64_t players = 0;

  void see(Vec<C> scores, int64_t i, IntVec<C> lanes) {
    const Mask<C> higher = greater(scores, score);
    score = select<C>(higher, scores, score);
    place = select<C>(higher, lanes + int_t<C>(i), place);
    players += kLanes<C> - __builtin_popcount(lane_bits<C>(is_nan(scores)));
  }

  Next result(const Players<C>& p) const {
    C best = 0;
    int64_t at = -1;
    for (int lane = 0; lane < kLanes<C>; ++lane) {
      if (place[lane] < 0) continue;
      if (at >= 0 && !(score[lane] > best || (score[lane] == best && place[lane] < at))) continue;
      best = score[lane];
      at = place[lane];
    }
    if (at < 0 && players > 0) {  // all scores in play are -inf
      for (at = 0; p.score[at] != p.score[at];) ++at;
    }
    return {at, players};
  }
};

// Decays the scores of the boxes that overlap box m, which leaves the play.
template <class C, bool GAUSSIAN, bool CLASSES>
Next sweep_players(const SoftNmsJob& job, Players<C>& p, int64_t m) {
  const Vec<C> mx1 = splat(p.x1[m]), my1 = splat(p.y1[m]), mx2 = splat(p.x2[m]), my2 = splat(p.y2[m]);
  const Vec<C> area = splat(p.area[m]), least = splat(C(GAUSSIAN ? 0 : job.iou_threshold));
  const Vec<C> floor = splat(C(job.score_threshold)), none = splat(C(__builtin_nan("")));
  IntVec<C> lanes;
  for (int lane = 0; lane < kLanes<C>; ++lane) lanes[lane] = int_t<C>(lane);
  Search<C> search;
  p.score[m] = none[0];
  for (int64_t i = 0; i < p.count; i += kLanes<C>) {
    Vec<C> score = load(p.score + i);
    const Vec<C> width = min_number(load(p.x2 + i), mx2) - max_number(load(p.x1 + i), mx1);
    const Vec<C> height = min_number(load(p.y2 + i), my2) - max_number(load(p.y1 + i), my1);
    const Vec<C> inter = overlap_of(width, height);
    if (any<C>(greater(inter, Vec<C>{}))) {
      const Vec<C> iou = inter / (area + load(p.area + i) - inter);
      Mask<C> hit = greater(iou, least);
      if constexpr (CLASSES) hit &= equal_int64<C>(p.classes + i, p.classes[m], Whole{});
      if (any<C>(hit)) {
        const Vec<C> weight = GAUSSIAN ? exp<C>(-rounded(iou * iou) / C(job.sigma)) : C(1) - iou;
        score = select<C>(hit, score * weight, score);
        score = select<C>(greater(floor, score), none, score);
        store(p.score + i, score);
      }
    }
    search.see(score, i, lanes);
  }
  return search.result(p);
}

template <class C>
Next first_player(const Players<C>& p) {
  Next next{-1, p.count};
  for (int64_t i = 0; i < p.count; ++i) {
    if (next.place < 0 || p.score[i] > p.score[next.place]) next.place = i;
  }
  return next;
}

template <class C, bool GAUSSIAN, bool CLASSES>
int64_t play(const SoftNmsJob& job, char* scratch) {
  Players<C> p;
  p.cut(scratch, job.count);
  load_players(job, p);
  int64_t taken = 0;
  for (Next next = first_player(p); next.players > 0; next = sweep_players<C, GAUSSIAN, CLASSES>(job, p, next.place)) {
    if (next.players < p.count - p.count / 4) next.place = p.close_gaps(next.place);
    job.indices[taken] = p.index[next.place];
    PYDL_FLOAT_SWITCH(job.score_dtype,
                      from_compute(compute_t<T>(p.score[next.place]), static_cast<T*>(job.new_scores) + taken));
    ++taken;
  }
  return taken;
}

template <class C>
int64_t play_as(const SoftNmsJob& job, char* scratch) {
  const bool classes = job.classes != nullptr;
  if (job.gaussian) return classes ? play<C, true, true>(job, scratch) : play<C, true, false>(job, scratch);
  return classes ? play<C, false, true>(job, scratch) : play<C, false, false>(job, scratch);
}

}  // namespace

// Writes indices and decayed scores in the order in which boxes are taken; returns how many.
int64_t soft_nms_play(const SoftNmsJob& job, char* scratch) {
  return job.wide ? play_as<double>(job, scratch) : play_as<float>(job, scratch);
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

#include "common/threshold.h"
#include "cpu/nms_order.h"

namespace pydl {

PYDL_CPU_DECLARE(int64_t, soft_nms_play, const SoftNmsJob&, char*)

namespace {

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes_in, const Tensor& scores_in,
                                    const std::optional<Tensor>& idxs_in, double iou_threshold, double sigma,
                                    double score_threshold, bool gaussian) {
  const NmsArrays in("soft_nms", boxes_in, 4, scores_in, idxs_in);
  STD_TORCH_CHECK(in.boxes.dim == 2, "soft_nms: boxes must have shape [N, 4]");
  STD_TORCH_CHECK(in.count < int64_t(1) << 31, "soft_nms: at most 2^31 - 1 boxes");
  const bool wide = in.boxes.dtype == Dtype::kDouble || in.scores.dtype == Dtype::kDouble;
  if (!wide) {
    iou_threshold = float_below(iou_threshold);
    score_threshold = float_above(score_threshold);
  }
  const int64_t count = in.count, bytes = (count + 1) * size_of(in.scores.dtype);
  const Scratch scratch(soft_nms_room(count) * (6 * int64_t(sizeof(double)) + 2 * int64_t(sizeof(int64_t))));
  const Scratch indices((count + 1) * int64_t(sizeof(int64_t))), new_scores(bytes);
  const SoftNmsJob job{
      in.boxes.data, in.scores.data, in.classes, count,           in.boxes.dtype,         in.scores.dtype, wide,
      gaussian,      iou_threshold,  sigma,      score_threshold, indices.get<int64_t>(), new_scores.get()};
  const int64_t taken = PYDL_CPU_DISPATCH(soft_nms_play)(job, scratch.get<char>());
  const Output out_indices = empty(&taken, 1, Dtype::kInt64), out_scores = empty(&taken, 1, in.scores.dtype);
  if (taken > 0) {
    std::memcpy(out_indices.data, job.indices, size_t(taken) * sizeof(int64_t));
    std::memcpy(out_scores.data, job.new_scores, size_t(taken * size_of(in.scores.dtype)));
  }
  return {out_indices.tensor, out_scores.tensor};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms)); }

}  // namespace
}  // namespace pydl

#endif
