// Connectionist temporal classification, backward: dx = g (exp(log-probability) - posterior of the class), where the
// posterior of a class is the sum over the states that have its label. Labels are subtracted one after the other in the
// target's order, so results are the same on every run.

#include "common/vec_math.h"
#include "cpu/ctc_batch.h"

namespace pydl {

struct CtcBwd {
  const CtcInput* input;
  const CtcItem* items;
  const void* scale;  // the gradient of each item's nll
  const void* nll;
  const void* rows;  // log2 of posteriors
  const void* lse;   // log of the sum of exp(x - the frame's largest logit)
  int64_t row_width;
  void* dx;
  int64_t dx_stride_t, dx_stride_n;
  bool zero_infinity, items_outside;  // items_outside: consecutive frames of dx are of the same item
};

namespace PYDL_ISA {
namespace {

template <class T, class C>
void fill(T* out, int64_t n, C value) {
  sweep<C>(n, [&](int64_t i, int, auto extent) { store(out + i, splat(value), extent); });
}

// Stores g times the posteriors of labels and returns that of the blank.
template <class C>
C weigh_posteriors(const C* row, int64_t length, C g, C* labels) {
  constexpr int L = kLanes<C>;
  const int64_t n = 2 * length + 1;
  Vec<C> blanks = {};
  int64_t i = 0;
  for (; 2 * (i + L) <= n; i += L) {
    const Vec<C> low = exp2<C>(load(row + 2 * i)), high = exp2<C>(load(row + 2 * i + L));
    blanks += even(low, high);
    store(labels + i, odd(low, high) * g);
  }
  if (2 * i < n) {
    const Vec<C> none = splat(-kInfinity<C>);
    const int64_t left = n - 2 * i;
    const Vec<C> low = exp2<C>(left >= L ? load(row + 2 * i) : load(row + 2 * i, Part{left}, none));
    const Vec<C> high = exp2<C>(left > L ? load(row + 2 * i + L, Part{left - L}, none) : none);
    blanks += even(low, high);
    store(labels + i, odd(low, high) * g);
  }
  return sum(blanks) * g;
}

template <class T, class C>
void bwd_frame(const CtcBwd& a, int64_t t, int64_t n, C* labels, C* buffer) {
  const CtcInput& in = *a.input;
  const CtcItem& item = a.items[n];
  T* dx = static_cast<T*>(a.dx) + t * a.dx_stride_t + n * a.dx_stride_n;
  if (t >= item.frames) return fill(dx, in.classes, C(0));
  const C nll = static_cast<const C*>(a.nll)[n], g = static_cast<const C*>(a.scale)[n];
  if (!(nll - nll == 0)) return fill(dx, in.classes, a.zero_infinity && nll > 0 ? C(0) : C(__builtin_nan("")));
  const T* x = static_cast<const T*>(in.x) + t * in.stride_t + n * in.stride_n;
  // In this order, x - top - log_sum has the rounding error of a small number also where logits are large.
  const C top = in.logits ? maximum(x, in.classes) : C(0);
  const C log_sum = in.logits ? static_cast<const C*>(a.lse)[t * in.items + n] : C(0);
  C* grad = buffer;
  if constexpr (is_same<T, C>) grad = dx;
  sweep<C>(in.classes, [&](int64_t c, int, auto extent) {
    store(grad + c, exp<C>((load(x + c, extent) - top) - log_sum) * g, extent);
  });
  const C* row = static_cast<const C*>(a.rows) + t * a.row_width + item.row_offset;
  grad[in.blank] -= weigh_posteriors(row, item.length, g, labels);
  const int64_t length = item.length;
  const int32_t* places = item.labels;
#pragma GCC unroll 8
  for (int64_t i = 0; i < length; ++i) grad[places[i]] -= labels[i];
  if constexpr (!is_same<T, C>) {
    sweep<C>(in.classes, [&](int64_t c, int, auto extent) { store(dx + c, load(grad + c, extent), extent); });
  }
}

template <class T, class C>
void bwd_frames(const CtcBwd& a, C* labels, C* buffer, int64_t begin, int64_t end) {
  const int64_t inner = a.items_outside ? a.input->frames : a.input->items;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t outer = i / inner, rest = i % inner;
    bwd_frame<T>(a, a.items_outside ? rest : outer, a.items_outside ? outer : rest, labels, buffer);
  }
}

}  // namespace

// Frames [begin, end) in the order of memory. `labels` has room for the longest target and a vector more, `buffer` for
// a frame.
void ctc_bwd_frames(const CtcBwd& a, void* labels, void* buffer, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.input->dtype, bwd_frames<T>(a, static_cast<compute_t<T>*>(labels),
                                                  static_cast<compute_t<T>*>(buffer), begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, ctc_bwd_frames, const CtcBwd&, void*, void*, int64_t, int64_t)

namespace {

// What each item's nll contributes to the loss, times the loss's gradient.
template <class C>
void item_gradients(const CtcBatch& batch, const Array& dloss, int64_t reduction, C* out) {
  const C* given = static_cast<const C*>(dloss.data);
  const int64_t items = batch.input().items;
  for (int64_t n = 0; n < items; ++n) {
    out[n] = reduction == 0 ? given[n * dloss.strides[0]] : given[0];
    if (reduction == 1) out[n] = out[n] / C(items) / C(std::max<int64_t>(batch.items()[size_t(n)].length, 1));
  }
}

void check_size(const Array& array, const char* name, Dtype dtype, int64_t numel) {
  STD_TORCH_CHECK(array.dtype == dtype && array.numel() == numel, "ctc_loss: ", name, " must have ", numel,
                  " elements of ", name_of(dtype), ", got ", array.numel(), " of ", name_of(array.dtype));
}

Tensor ctc_loss_bwd(const Tensor& dloss, const Tensor& x, const Tensor& targets, const Tensor& input_lengths,
                    const Tensor& target_lengths, const Tensor& nll, const Tensor& rows, const Tensor& lse,
                    const Tensor& /*chain*/, int64_t blank, bool logits, bool zero_infinity, int64_t reduction) {
  const CtcBatch batch("ctc_loss", x, targets, input_lengths, target_lengths, blank, logits);
  const CtcInput& input = batch.input();
  const Dtype compute = batch.compute();
  const Tensor held[3] = {as_contiguous(nll), as_contiguous(rows), as_contiguous(lse)};
  const Array dloss_meta(dloss), nll_meta(held[0]), rows_meta(held[1]), lse_meta(held[2]);
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "ctc_loss: reduction must be 0, 1 or 2, got ", reduction);
  STD_TORCH_CHECK(dloss_meta.dim == (reduction == 0 ? 1 : 0), "ctc_loss: dloss must have the loss's shape");
  check_size(dloss_meta, "dloss", compute, reduction == 0 ? input.items : 1);
  check_size(nll_meta, "nll", compute, input.items);
  check_size(rows_meta, "rows", compute, input.frames * batch.row_width());
  check_size(lse_meta, "lse", compute, logits ? input.frames * input.items : 0);

  Output dx = batch.empty_gradient();
  const Array dx_meta(dx.tensor);
  const int64_t size = size_of(compute);
  const Scratch scale(input.items * size);
  compute == Dtype::kDouble ? item_gradients(batch, dloss_meta, reduction, scale.get<double>())
                            : item_gradients(batch, dloss_meta, reduction, scale.get<float>());
  const CtcBwd args{&input,
                    batch.items().data(),
                    scale.get(),
                    nll_meta.data,
                    rows_meta.data,
                    lse_meta.data,
                    batch.row_width(),
                    dx.data,
                    dx_meta.strides[0],
                    dx_meta.strides[1],
                    zero_infinity,
                    dx_meta.strides[0] < dx_meta.strides[1]};
  parallel(input.frames * input.items, input.classes + 2 * batch.longest(), [&](int64_t begin, int64_t end) {
    const Scratch labels((batch.longest() + 16) * size), buffer(compute == input.dtype ? 0 : input.classes * size);
    PYDL_CPU_DISPATCH(ctc_bwd_frames)(args, labels.get(), buffer.get(), begin, end);
  });
  return std::move(dx.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("ctc_loss_bwd", TORCH_BOX(&ctc_loss_bwd)); }

}  // namespace
}  // namespace pydl

#endif
