// Batch normalisation, forward (Ioffe and Szegedy, "Batch normalization", 2015), with an optional addition and relu
// behind it: y = (x - mean) * scale + shift per channel. In the contiguous layout a thread takes whole channels, so
// that x is read from memory once and from its cache the second time.

#include "cpu/batch_norm_kernels.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

// What follows the normalisation. The bits of the mask say where the result is not 0 or less, NaN included, as torch's
// relu lets gradients through.
enum Tail { kPlain, kRelu, kReluMask };

template <bool ADD, Tail TAIL, class T, class C, class Extent>
inline void finish(Vec<C> v, const T* residual, T* y, uint8_t* mask, int64_t i, Extent extent) {
  if constexpr (ADD) v += load(residual + i, extent);
  if constexpr (TAIL == kReluMask) {
    store_bits<C>(mask, i, bits_of<C>(greater(v, Vec<C>{})) | bits_of<C>(is_nan(v)), extent);
  }
  if constexpr (TAIL != kPlain) v = max_number(Vec<C>{}, v);
  store(y + i, v, extent);
}

template <bool ADD, Tail TAIL, class T, class C>
void apply_piece(const BatchNorm& a, int64_t channel, const Piece& piece) {
  const C* table = static_cast<const C*>(a.coefficients) + channel;
  const Vec<C> mean = splat(table[0]), scale = splat(table[a.cut.width]), shift = splat(table[2 * a.cut.width]);
  const T* x = static_cast<const T*>(a.x) + piece.offset;
  const T* residual = ADD ? static_cast<const T*>(a.residual) + piece.offset : nullptr;
  T* y = static_cast<T*>(a.y) + piece.offset;
  uint8_t* mask = TAIL == kReluMask ? a.mask + piece.plane * ((a.shape.inner + 7) / 8) + piece.start / 8 : nullptr;
  sweep<C>(piece.n, [&](int64_t i, int, auto extent) {
    finish<ADD, TAIL, T, C>((load(x + i, extent) - mean) * scale + shift, residual, y, mask, i, extent);
  });
}

// Rows row ... row + R of equal width.
template <bool ADD, Tail TAIL, int R, class T, class C>
void apply_rows(const BatchNorm& a, int64_t row, int64_t n) {
  const int64_t width = a.cut.width;
  const C* table = static_cast<const C*>(a.coefficients);
  const T* x = static_cast<const T*>(a.x) + row * width;
  const T* residual = ADD ? static_cast<const T*>(a.residual) + row * width : nullptr;
  T* y = static_cast<T*>(a.y) + row * width;
  uint8_t* mask = TAIL == kReluMask ? a.mask + row * width / 8 : nullptr;
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> mean = load(table + i, extent), scale = load(table + width + i, extent);
    const Vec<C> shift = load(table + 2 * width + i, extent);
    for (int r = 0; r < R; ++r) {
      finish<ADD, TAIL, T, C>((load(x + r * width + i, extent) - mean) * scale + shift,
                              ADD ? residual + r * width : nullptr, y + r * width,
                              TAIL == kReluMask ? mask + r * width / 8 : nullptr, i, extent);
    }
  });
}

// The kernels of one dtype and tail, over the ranges that the entry points take.
template <class T>
struct Apply {
  using C = compute_t<T>;

  template <bool ADD, Tail TAIL>
  static void planes(const BatchNorm& a, int64_t begin, int64_t end) {
    const auto apply = [&](int64_t channel, const Piece& piece) { apply_piece<ADD, TAIL, T, C>(a, channel, piece); };
    if (a.out_mean != nullptr) {
      each_plane_piece_back(a.shape, a.cut, begin, end, apply);
    } else {
      each_plane_piece(a.shape, a.cut, begin, end, apply);
    }
  }

  template <bool ADD, Tail TAIL>
  static void channels(const BatchNorm& a, int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      batch_norm_plane_stats(a, channel * a.cut.chunks, (channel + 1) * a.cut.chunks);
      batch_norm_merge(a, channel, channel + 1);
      each_piece_back(a.shape, a.cut, channel,
                      [&](const Piece& piece) { apply_piece<ADD, TAIL, T, C>(a, channel, piece); });
    }
  }

  template <bool ADD, Tail TAIL>
  static void rows(const BatchNorm& a, int64_t begin, int64_t end) {
    if (a.out_mean == nullptr) {  // no pass before this one
      const int64_t full = smaller(end, a.cut.full);
      int64_t row = begin;
      for (; row + 4 <= full; row += 4) apply_rows<ADD, TAIL, 4, T, C>(a, row, a.cut.width);
      for (; row < full; ++row) apply_rows<ADD, TAIL, 1, T, C>(a, row, a.cut.width);
      if (end > a.cut.full) apply_rows<ADD, TAIL, 1, T, C>(a, a.cut.full, a.cut.rest);
      return;
    }
    // from the last to the first: what the statistics read last is in the cache
    if (end > a.cut.full) apply_rows<ADD, TAIL, 1, T, C>(a, a.cut.full, a.cut.rest);
    int64_t row = smaller(end, a.cut.full);
    for (; row - 4 >= begin; row -= 4) apply_rows<ADD, TAIL, 4, T, C>(a, row - 4, a.cut.width);
    while (row > begin) apply_rows<ADD, TAIL, 1, T, C>(a, --row, a.cut.width);
  }
};

// Calls KERNEL<ADD, TAIL> of a struct of kernels.
#define PYDL_WITH_TAIL(KERNEL, a, begin, end)                        \
  if ((a).residual != nullptr) {                                     \
    !(a).relu             ? KERNEL<true, kPlain>(a, begin, end)      \
    : (a).mask == nullptr ? KERNEL<true, kRelu>(a, begin, end)       \
                          : KERNEL<true, kReluMask>(a, begin, end);  \
  } else {                                                           \
    !(a).relu             ? KERNEL<false, kPlain>(a, begin, end)     \
    : (a).mask == nullptr ? KERNEL<false, kRelu>(a, begin, end)      \
                          : KERNEL<false, kReluMask>(a, begin, end); \
  }

}  // namespace

// Statistics and result of channels [begin, end) of planes.
void batch_norm_channels(const BatchNorm& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_TAIL(Apply<T>::template channels, a, begin, end));
}

// Pieces [begin, end) of all planes, as they lie in memory.
void batch_norm_planes(const BatchNorm& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_TAIL(Apply<T>::template planes, a, begin, end));
}

// Wide rows [begin, end).
void batch_norm_rows(const BatchNorm& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_TAIL(Apply<T>::template rows, a, begin, end));
}

// running = (1 - momentum) * running + momentum * factor * batch, n values at a stride.
void batch_norm_update(const Parameter& batch, void* running, Dtype dtype, int64_t n, int64_t stride, double momentum,
                       double factor) {
  double values[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = smaller(kBlock, n - start);
    widen_parameter(batch, 0.0, values, start, size);
    for (int64_t i = 0; i < size; ++i) {
      PYDL_FLOAT_SWITCH(dtype, {
        T* at = static_cast<T*>(running) + (start + i) * stride;
        from_compute(compute_t<T>((1 - momentum) * to_compute(*at) + momentum * factor * values[i]), at);
      });
    }
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, batch_norm_plane_stats, const BatchNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_row_stats, const BatchNorm&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_merge, const BatchNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_channels, const BatchNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_planes, const BatchNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_rows, const BatchNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_update, const Parameter&, void*, Dtype, int64_t, int64_t, double, double)

namespace {

// Mean and variance of every channel, and the coefficients if there is a table for them.
void run_statistics(const BatchNorm& a) {
  const Cut& cut = a.cut;
  if (a.shape.rows()) {
    const int64_t row = cut.width * size_of(compute_dtype(a.dtype));
    parallel(cut.chunks + (cut.rest > 0), cut.chunk_rows * cut.width, [&](int64_t begin, int64_t end) {
      const Scratch buffer(3 * row);
      PYDL_CPU_DISPATCH(batch_norm_row_stats)(a, buffer.get(), begin, end);
    });
  } else {
    parallel(a.shape.channels * cut.chunks, cut.chunk_items * cut.piece,
             [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_plane_stats)(a, begin, end); });
  }
  parallel(a.shape.channels, partial_size(a.shape, cut) / a.shape.channels,
           [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_merge)(a, begin, end); });
}

void run_apply(const BatchNorm& a) {
  const Cut& cut = a.cut;
  if (a.shape.rows()) {
    parallel(cut.full + (cut.rest > 0), cut.width,
             [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_rows)(a, begin, end); });
  } else {
    parallel(cut.items * a.shape.channels, cut.piece,
             [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_planes)(a, begin, end); });
  }
}

// An empty batch has no statistics: zeros stand for them.
Output empty_statistic(const BatchNorm& a, int64_t channels) {
  const Dtype dtype = compute_dtype(a.dtype);
  Output out = empty_vector(channels, dtype);
  if (a.shape.numel() == 0 && channels > 0) std::memset(out.data, 0, size_t(channels * size_of(dtype)));
  return out;
}

struct Forward {
  Output y, mask;
};

// y, and where it is above 0, of x in a dense layout; the statistics are given, or written to out_mean and out_var.
Forward forward(const char* op, const Dense& x, const std::optional<Tensor>& residual_in, BatchNorm& a,
                const Layout& layout, bool keep) {
  std::optional<Dense> residual;
  if (residual_in.has_value()) residual = layout.dense_in(op, "residual", *residual_in, a.dtype);
  const int64_t bytes = keep ? a.shape.mask_bytes() : 0;
  Forward out{empty_like(layout, a.dtype), empty_vector(bytes, Dtype::kUInt8)};
  if (a.shape.numel() == 0) return out;
  a.x = x.data;
  a.residual = residual.has_value() ? residual->data : nullptr;
  a.y = out.y.data;
  a.mask = keep ? static_cast<uint8_t*>(out.mask.data) : nullptr;
  const Scratch table(kCoefficients * a.cut.width * size_of(compute_dtype(a.dtype)));
  const Scratch partial(a.out_mean != nullptr ? partial_size(a.shape, a.cut) * 8 : 0);
  a.coefficients = table.get();
  a.partial = partial.get<double>();
  if (a.out_mean == nullptr) {
    PYDL_CPU_DISPATCH(batch_norm_merge)(a, 0, a.shape.channels);
  } else if (by_channel(a.shape)) {
    parallel(a.shape.channels, a.shape.per_channel(),
             [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_channels)(a, begin, end); });
    return out;
  } else {
    run_statistics(a);
  }
  run_apply(a);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const std::optional<Tensor>& weight,
                                                            const std::optional<Tensor>& bias,
                                                            const std::optional<Tensor>& residual, bool relu,
                                                            double eps) {
  const char* const op = "batch_norm_train";
  const Array meta(x);
  const Layout layout(op, meta);
  auto a = describe<BatchNorm>(op, meta, layout, eps);
  const int64_t channels = meta.sizes[1];
  const Operand w(op, "weight", weight, channels), b(op, "bias", bias, channels);
  Output mean = empty_statistic(a, channels), var = empty_statistic(a, channels);
  a.weight = w.value;
  a.bias = b.value;
  a.out_mean = mean.data;
  a.out_var = var.data;
  a.relu = relu;
  Forward out = forward(op, layout.dense_in(op, "x", x, meta, a.dtype), residual, a, layout, relu);
  return {std::move(out.y.tensor), std::move(mean.tensor), std::move(var.tensor), std::move(out.mask.tensor)};
}

std::tuple<Tensor, Tensor> batch_norm_eval(const Tensor& x, const Tensor& mean, const Tensor& var,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual, bool relu, double eps, bool keep) {
  const char* const op = "batch_norm_eval";
  const Array meta(x);
  const Layout layout(op, meta);
  auto a = describe<BatchNorm>(op, meta, layout, eps);
  const int64_t channels = meta.sizes[1];
  const Operand w(op, "weight", weight, channels), b(op, "bias", bias, channels);
  const Operand mu(op, "mean", mean, channels), sigma(op, "var", var, channels);
  a.weight = w.value;
  a.bias = b.value;
  a.mean = mu.value;
  a.var = sigma.value;
  a.relu = relu;
  Forward out = forward(op, layout.dense_in(op, "x", x, meta, a.dtype), residual, a, layout, relu && keep);
  return {std::move(out.y.tensor), std::move(out.mask.tensor)};
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x_in) {
  const char* const op = "batch_norm_stats";
  const Array meta(x_in);
  const Layout layout(op, meta);
  auto a = describe<BatchNorm>(op, meta, layout, 0.0);
  const Dense x = layout.dense_in(op, "x", x_in, meta, a.dtype);
  Output mean = empty_statistic(a, meta.sizes[1]), var = empty_statistic(a, meta.sizes[1]);
  if (a.shape.numel() > 0) {
    const Scratch partial(partial_size(a.shape, a.cut) * 8);
    a.x = x.data;
    a.out_mean = mean.data;
    a.out_var = var.data;
    a.partial = partial.get<double>();
    run_statistics(a);
  }
  return {std::move(mean.tensor), std::move(var.tensor)};
}

// running = (1 - momentum) * running + momentum * factor * batch, in place.
void update(const char* op, const char* name, const std::optional<Tensor>& running, const Tensor& batch,
            double momentum, double factor) {
  if (!running.has_value()) return;
  const Array to(*running);
  const Operand from(op, "the batch's statistic", batch, to.numel());
  STD_TORCH_CHECK(to.dim == 1 && is_floating(to.dtype), op, ": ", name,
                  " must have one dimension and be floating point");
  PYDL_CPU_DISPATCH(batch_norm_update)(from.value, to.data, to.dtype, to.sizes[0], to.strides[0], momentum, factor);
}

void batch_norm_update(const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                       const Tensor& mean, const Tensor& var, double momentum, double correction) {
  update("batch_norm_update", "running_mean", running_mean, mean, momentum, 1.0);
  update("batch_norm_update", "running_var", running_var, var, momentum, correction);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("batch_norm_train", TORCH_BOX(&batch_norm_train));
  m.impl("batch_norm_eval", TORCH_BOX(&batch_norm_eval));
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update));
}

}  // namespace
}  // namespace pydl

#endif
