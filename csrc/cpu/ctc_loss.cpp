// Connectionist temporal classification, forward (Graves et al., "Connectionist Temporal Classification", 2006): the
// probability of a target is a sum over paths through 2 L + 1 states, blank, label 0, blank, label 1, ..., blank.
//
// alpha (paths that arrive in a state) and beta (paths that leave it) are products and sums of probabilities, each a
// factor near 1 times 2^power with a power of its own. That has the range of logarithms, at two multiplications where
// they need an exponential and a logarithm, and rounding errors are relative: they do not grow with a path's length.
// alpha runs to the middle frame and beta down to it, each keeping its rows; there the likelihood is known, and each
// goes on over the rows of the other, turning them into posteriors.

#include "cpu/ctc_loss_lattice.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

template <class T>
void run_item(CtcWork& work) {
  Lattice<T> lattice(work);
  lattice.begin();
  lattice.template alpha_to_middle<true>();
  lattice.template beta_to_middle<true>();
  lattice.meet();
  if (!wants_posteriors(work)) return;
  lattice.alpha_to_end();
  lattice.beta_to_begin();
}

template <class T>
void run_stage(CtcWork& work, CtcStage stage) {
  Lattice<T> lattice(work);
  switch (stage) {
    case CtcStage::kBegin:
      return lattice.begin();
    case CtcStage::kAlphaToMiddle:
      return lattice.template alpha_to_middle<false>();
    case CtcStage::kBetaToMiddle:
      return lattice.template beta_to_middle<false>();
    case CtcStage::kMeet:
      return lattice.meet();
    case CtcStage::kAlphaToEnd:
      return lattice.alpha_to_end();
    case CtcStage::kBetaToBegin:
      return lattice.beta_to_begin();
  }
}

}  // namespace

// The whole of an item.
void ctc_item(CtcWork& work) {
  const uint32_t saved = flush_subnormals();
  PYDL_FLOAT_SWITCH(work.input->dtype, run_item<T>(work));
  restore_subnormals(saved);
}

// The same in pieces: emissions of the block that begins at `frame`, which must all exist first, and the stages.
void ctc_emit(CtcWork& work, int64_t frame) { PYDL_FLOAT_SWITCH(work.input->dtype, Lattice<T>(work).emit(frame)); }
void ctc_stage(CtcWork& work, CtcStage stage) {
  const uint32_t saved = flush_subnormals();
  PYDL_FLOAT_SWITCH(work.input->dtype, run_stage<T>(work, stage));
  restore_subnormals(saved);
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, ctc_item, CtcWork&)
PYDL_CPU_DECLARE(void, ctc_emit, CtcWork&, int64_t)
PYDL_CPU_DECLARE(void, ctc_stage, CtcWork&, CtcStage)

namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

double get(const Output& array, Dtype compute, int64_t i) {
  return compute == Dtype::kDouble ? static_cast<const double*>(array.data)[i]
                                   : static_cast<const float*>(array.data)[i];
}
void put(const Output& array, Dtype compute, int64_t i, double value) {
  if (compute == Dtype::kDouble) {
    static_cast<double*>(array.data)[i] = value;
  } else {
    static_cast<float*>(array.data)[i] = float(value);
  }
}

// Cuts the memory of one item.
struct Layout {
  Layout(Dtype compute, int64_t frames, int64_t length, bool whole, bool keep)
      : size(size_of(compute)),
        width(round_up(length + 1, 64 / size)),
        emissions(whole ? round_up(frames, kBlock) : kBlock),
        rows(keep ? frames + 2 : 2) {}

  int64_t emission() const { return emissions * 2 * width * size; }
  int64_t blank() const { return 2 * emissions * size; }
  int64_t skip() const { return (width + 16) * size; }
  int64_t state() const { return rows * 4 * width * size; }
  int64_t bytes() const { return round_up(emission() + blank() + skip() + state() + rows * 8, 64); }

  void cut(char* memory, CtcWork& work) const {
    work.width = width;
    work.emissions = emissions;
    work.emission = memory;
    work.blank = memory += emission();
    work.skip = memory += blank();
    work.state = memory += skip();
    work.offset = reinterpret_cast<double*>(memory + state());
  }

  int64_t size, width, emissions, rows;
};

// Negative log-likelihoods and, unless rows is null, posteriors; for logits with them lse.
class Forward {
 public:
  Forward(const CtcBatch& batch, const Output& nll, const Output* rows, const Output* lse)
      : batch_(batch), nll_(nll), rows_(rows), lse_(lse) {}

  void run() const {
    std::vector<CtcWork> works;
    int64_t frames = 0;
    for (const CtcItem& item : batch_.items()) {
      const int64_t n = &item - batch_.items().data();
      put(nll_, batch_.compute(), n, item.length == 0 ? 0.0 : kInfinite);
      if (item.frames > 0) works.push_back(work_of(item, n));
      frames = std::max(frames, item.frames);
    }
    const int64_t count = int64_t(works.size()), threads = torch::stable::get_num_threads();
    const int64_t work = frames * (4 * batch_.longest() + 64);
    if (count % threads != 0 && count < 2 * threads && count * work > 65536) {
      run_in_halves(works, frames, work);
    } else {
      run_items(works, frames, work);
    }
    for (const CtcWork& work : works) put(nll_, batch_.compute(), work.number, work.nll);
  }

 private:
  CtcWork work_of(const CtcItem& item, int64_t n) const {
    const int64_t size = size_of(batch_.compute());
    CtcWork work{};
    work.input = &batch_.input();
    work.item = item;
    work.number = n;
    if (rows_ != nullptr) work.posterior = static_cast<char*>(rows_->data) + item.row_offset * size;
    work.posterior_stride = batch_.row_width();
    if (lse_ != nullptr) work.lse = static_cast<char*>(lse_->data) + n * size;
    return work;
  }
  Layout layout(int64_t frames, int64_t length, bool whole) const {
    return Layout(batch_.compute(), frames, length, whole, rows_ != nullptr);
  }

  void run_items(std::vector<CtcWork>& works, int64_t frames, int64_t work) const {
    const bool whole = rows_ != nullptr;
    parallel(int64_t(works.size()), work, [&](int64_t begin, int64_t end) {
      const Scratch scratch(layout(frames, batch_.longest(), whole).bytes());
      for (int64_t i = begin; i < end; ++i) {
        CtcWork& item = works[size_t(i)];
        layout(item.item.frames, item.item.length, whole).cut(scratch.get<char>(), item);
        PYDL_CPU_DISPATCH(ctc_item)(item);
      }
    });
  }

  // For few items: blocks of frames, then the two halves of each item side by side.
  void run_in_halves(std::vector<CtcWork>& works, int64_t frames, int64_t work) const {
    const int64_t count = int64_t(works.size()), blocks = (frames + kBlock - 1) / kBlock;
    const int64_t bytes = layout(frames, batch_.longest(), true).bytes();
    const Scratch scratch(count * bytes);
    for (int64_t i = 0; i < count; ++i) {
      CtcWork& item = works[size_t(i)];
      layout(item.item.frames, item.item.length, true).cut(scratch.get<char>() + i * bytes, item);
      PYDL_CPU_DISPATCH(ctc_stage)(item, CtcStage::kBegin);
    }
    const int64_t read = batch_.longest() + (batch_.input().logits ? batch_.input().classes : 0);
    parallel(count * blocks, kBlock * read, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        CtcWork& item = works[size_t(i / blocks)];
        const int64_t frame = i % blocks * kBlock;
        if (frame < item.item.frames) PYDL_CPU_DISPATCH(ctc_emit)(item, frame);
      }
    });
    const auto both = [&](CtcStage alpha, CtcStage beta, bool all) {
      parallel(2 * count, work / 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          CtcWork& item = works[size_t(i / 2)];
          if (all || wants_posteriors(item)) PYDL_CPU_DISPATCH(ctc_stage)(item, i % 2 == 0 ? alpha : beta);
        }
      });
    };
    both(CtcStage::kAlphaToMiddle, CtcStage::kBetaToMiddle, true);
    for (CtcWork& item : works) PYDL_CPU_DISPATCH(ctc_stage)(item, CtcStage::kMeet);
    both(CtcStage::kAlphaToEnd, CtcStage::kBetaToBegin, false);
  }

  const CtcBatch& batch_;
  const Output& nll_;
  const Output* rows_;
  const Output* lse_;
};

Output reduce(const CtcBatch& batch, const Output& nll, bool zero_infinity, int64_t reduction) {
  const Dtype compute = batch.compute();
  const int64_t items = batch.input().items;
  Output loss = empty(&items, reduction == 0 ? 1 : 0, compute);
  double total = 0;
  for (int64_t n = 0; n < items; ++n) {
    double value = get(nll, compute, n);
    if (zero_infinity && value == kInfinite) value = 0;
    if (reduction == 0) put(loss, compute, n, value);
    const int64_t length = batch.items()[size_t(n)].length;
    total += reduction == 1 ? value / double(std::max<int64_t>(length, 1)) : value;
  }
  if (reduction != 0) put(loss, compute, 0, reduction == 1 ? total / double(items) : total);
  return loss;
}

void check_call(const CtcBatch& batch, int64_t max_length, int64_t reduction) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "ctc_loss: reduction must be 0, 1 or 2, got ", reduction);
  STD_TORCH_CHECK(batch.longest() <= max_length, "ctc_loss: max_length is ", max_length, " but a target has ",
                  batch.longest(), " labels");
}

Tensor ctc_loss_value(const Tensor& x, const Tensor& targets, const Tensor& input_lengths, const Tensor& target_lengths,
                      int64_t blank, int64_t max_length, bool logits, bool zero_infinity, int64_t reduction) {
  const CtcBatch batch("ctc_loss", x, targets, input_lengths, target_lengths, blank, logits);
  check_call(batch, max_length, reduction);
  Output nll = empty(&batch.input().items, 1, batch.compute());
  Forward(batch, nll, nullptr, nullptr).run();
  return reduce(batch, nll, zero_infinity, reduction).tensor;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ctc_loss_fwd(const Tensor& x, const Tensor& targets,
                                                                const Tensor& input_lengths,
                                                                const Tensor& target_lengths, int64_t blank,
                                                                int64_t max_length, bool logits, bool zero_infinity,
                                                                int64_t reduction) {
  const CtcBatch batch("ctc_loss", x, targets, input_lengths, target_lengths, blank, logits);
  check_call(batch, max_length, reduction);
  const CtcInput& input = batch.input();
  const int64_t states = input.frames * batch.row_width(), positions = batch.positions(), none = 0;
  const int64_t frames[2] = {input.frames, input.items};
  Output nll = empty(&input.items, 1, batch.compute()), rows = empty(&states, 1, batch.compute());
  Output lse = logits ? empty(frames, 2, batch.compute()) : empty(&none, 1, batch.compute());
  Output chain = empty(&positions, 1, Dtype::kInt32);
  std::memset(chain.data, 0, size_t(positions) * sizeof(int32_t));
  Forward(batch, nll, &rows, logits ? &lse : nullptr).run();
  Output loss = reduce(batch, nll, zero_infinity, reduction);
  return {std::move(loss.tensor), std::move(nll.tensor), std::move(rows.tensor), std::move(lse.tensor),
          std::move(chain.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("ctc_loss_value", TORCH_BOX(&ctc_loss_value));
  m.impl("ctc_loss_fwd", TORCH_BOX(&ctc_loss_fwd));
}

}  // namespace
}  // namespace pydl

#endif
