// Batch normalisation, backward. With dz the gradient behind the activation's mask, n values per channel and
// xhat = (x - mean) * rstd:
//   dbias = sum dz,  dweight = sum dz * xhat,  dresidual = dz,
//   dx = (dz - dbias / n - xhat * dweight / n) * weight * rstd, with given statistics dz * weight * rstd.

#include "cpu/batch_norm_kernels.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

template <bool TRAIN, bool MASK, class T, class C, class Extent>
inline void put_dx(Vec<C> dz, const T* x, T* dx, T* dresidual, int64_t i, Vec<C> mean, Vec<C> along, Vec<C> slope,
                   Vec<C> scale, Extent extent) {
  if (MASK && dresidual != nullptr) store(dresidual + i, dz, extent);
  if (dx == nullptr) return;
  fetch_ahead(dx + i);
  // In this order equal terms cancel exactly, as they must where a channel has one or two values.
  if constexpr (TRAIN) dz = (dz - along) - (load(x + i, extent) - mean) * slope;
  store(dx + i, dz * scale, extent);
}

template <bool TRAIN, bool MASK, class T, class C>
void dx_piece(const BatchNormBwd& a, int64_t channel, const Piece& piece) {
  const int64_t width = a.cut.width;
  const C* table = static_cast<const C*>(a.coefficients) + channel;
  const Vec<C> mean = splat(table[0]), along = splat(table[width]), slope = splat(table[2 * width]);
  const Vec<C> scale = splat(table[3 * width]);
  const T *x = static_cast<const T*>(a.x) + piece.offset, *dy = static_cast<const T*>(a.dy) + piece.offset;
  T* dx = a.dx != nullptr ? static_cast<T*>(a.dx) + piece.offset : nullptr;
  T* dresidual = a.dresidual != nullptr ? static_cast<T*>(a.dresidual) + piece.offset : nullptr;
  const uint8_t* mask = MASK ? a.mask + piece.plane * ((a.shape.inner + 7) / 8) + piece.start / 8 : nullptr;
  sweep<C>(piece.n, [&](int64_t i, int, auto extent) {
    put_dx<TRAIN, MASK, T, C>(load_dz<MASK, T, C>(dy, mask, i, extent), x, dx, dresidual, i, mean, along, slope, scale,
                              extent);
  });
}

template <bool TRAIN, bool MASK, int R, class T, class C>
void dx_rows(const BatchNormBwd& a, int64_t row, int64_t n) {
  const int64_t width = a.cut.width, offset = row * width;
  const C* table = static_cast<const C*>(a.coefficients);
  const T *x = static_cast<const T*>(a.x) + offset, *dy = static_cast<const T*>(a.dy) + offset;
  T* dx = a.dx != nullptr ? static_cast<T*>(a.dx) + offset : nullptr;
  T* dresidual = a.dresidual != nullptr ? static_cast<T*>(a.dresidual) + offset : nullptr;
  const uint8_t* mask = MASK ? a.mask + offset / 8 : nullptr;
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> mean = load(table + i, extent), along = load(table + width + i, extent);
    const Vec<C> slope = load(table + 2 * width + i, extent), scale = load(table + 3 * width + i, extent);
    for (int r = 0; r < R; ++r) {
      const int64_t down = r * width;
      const Vec<C> dz = load_dz<MASK, T, C>(dy + down, MASK ? mask + down / 8 : nullptr, i, extent);
      put_dx<TRAIN, MASK, T, C>(dz, x + down, dx != nullptr ? dx + down : nullptr,
                                dresidual != nullptr ? dresidual + down : nullptr, i, mean, along, slope, scale,
                                extent);
    }
  });
}

template <class T>
struct Backward {
  using C = compute_t<T>;

  template <bool TRAIN, bool MASK>
  static void planes(const BatchNormBwd& a, int64_t begin, int64_t end) {
    each_plane_piece_back(a.shape, a.cut, begin, end,
                          [&](int64_t channel, const Piece& piece) { dx_piece<TRAIN, MASK, T, C>(a, channel, piece); });
  }

  template <bool TRAIN, bool MASK>
  static void channels(const BatchNormBwd& a, int64_t begin, int64_t end) {
    if (end - begin == 1) {
      return each_piece_back(a.shape, a.cut, begin,
                             [&](const Piece& piece) { dx_piece<TRAIN, MASK, T, C>(a, begin, piece); });
    }
    for (int64_t o = 0; o < a.shape.outer; ++o) {
      for (int64_t c = begin; c < end; ++c) {
        dx_piece<TRAIN, MASK, T, C>(a, c, piece_of(a.shape, a.cut, o * a.shape.channels + c, 0));
      }
    }
  }

  template <bool TRAIN, bool MASK>
  static void rows(const BatchNormBwd& a, int64_t begin, int64_t end) {
    // from the last to the first: what the sums read last is in the cache
    if (end > a.cut.full) dx_rows<TRAIN, MASK, 1, T, C>(a, a.cut.full, a.cut.rest);
    int64_t row = smaller(end, a.cut.full);
    for (; row - 4 >= begin; row -= 4) dx_rows<TRAIN, MASK, 4, T, C>(a, row - 4, a.cut.width);
    while (row > begin) dx_rows<TRAIN, MASK, 1, T, C>(a, --row, a.cut.width);
  }
};

#define PYDL_WITH_MASK(KERNEL, a, begin, end)                                                       \
  if ((a).training) {                                                                               \
    (a).mask != nullptr ? KERNEL<true, true>(a, begin, end) : KERNEL<true, false>(a, begin, end);   \
  } else {                                                                                          \
    (a).mask != nullptr ? KERNEL<false, true>(a, begin, end) : KERNEL<false, false>(a, begin, end); \
  }

}  // namespace

// Everything of channels [begin, end) of planes.
void batch_norm_bwd_channels(const BatchNormBwd& a, int64_t begin, int64_t end) {
  const int64_t at_once = channels_at_once(a.shape);
  for (int64_t c = begin; c < end; c += at_once) {
    const int64_t last = smaller(end, c + at_once);
    batch_norm_bwd_means(a, c, last);
    if (short_planes(a.shape)) {
      for (int64_t chunk = 0; chunk < a.cut.chunks; ++chunk) batch_norm_bwd_short_sums(a, c, last - c, chunk);
    } else {
      batch_norm_bwd_sums(a, nullptr, c * a.cut.chunks, last * a.cut.chunks);
    }
    batch_norm_bwd_merge(a, c, last);
    if (a.dx == nullptr && a.dresidual == nullptr) continue;
    PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_MASK(Backward<T>::template channels, a, c, last));
  }
}

// Pieces [begin, end) of all planes, as they lie in memory.
void batch_norm_bwd_planes(const BatchNormBwd& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_MASK(Backward<T>::template planes, a, begin, end));
}

// Wide rows [begin, end).
void batch_norm_bwd_rows(const BatchNormBwd& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_MASK(Backward<T>::template rows, a, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, batch_norm_bwd_sums, const BatchNormBwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_bwd_means, const BatchNormBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_bwd_merge, const BatchNormBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_bwd_channels, const BatchNormBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_bwd_planes, const BatchNormBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, batch_norm_bwd_rows, const BatchNormBwd&, int64_t, int64_t)

namespace {

void run_sums(const BatchNormBwd& a) {
  const Cut& cut = a.cut;
  const bool rows = a.shape.rows();
  PYDL_CPU_DISPATCH(batch_norm_bwd_means)(a, 0, a.shape.channels);
  const int64_t chunks = rows ? cut.chunks + (cut.rest > 0) : a.shape.channels * cut.chunks;
  parallel(chunks, 2 * (rows ? cut.chunk_rows * cut.width : cut.chunk_items * cut.piece),
           [&](int64_t begin, int64_t end) {
             const Scratch buffer(rows ? 2 * cut.width * size_of(compute_dtype(a.dtype)) : 0);
             PYDL_CPU_DISPATCH(batch_norm_bwd_sums)(a, buffer.get(), begin, end);
           });
}

void run_backward(BatchNormBwd& a, bool sums) {
  const Cut& cut = a.cut;
  const Scratch table(kCoefficients * cut.width * size_of(compute_dtype(a.dtype)));
  const Scratch partial(sums ? partial_size(a.shape, cut) * 8 : 0);
  a.coefficients = table.get();
  a.partial = partial.get<double>();
  const int64_t channels = a.shape.channels;
  if (sums && by_channel(a.shape)) {
    parallel(channels, 2 * a.shape.per_channel(),
             [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_bwd_channels)(a, begin, end); });
    return;
  }
  if (sums) run_sums(a);
  parallel(channels, sums ? partial_size(a.shape, cut) / channels : 1,
           [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_bwd_merge)(a, begin, end); });
  if (a.dx == nullptr && a.dresidual == nullptr) return;
  if (a.shape.rows()) {
    parallel(cut.full + (cut.rest > 0), 2 * cut.width,
             [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_bwd_rows)(a, begin, end); });
  } else {
    parallel(cut.items * channels, 2 * cut.piece,
             [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(batch_norm_bwd_planes)(a, begin, end); });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& dy_in, const Tensor& x_in, const Tensor& mean,
                                                          const Tensor& var, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& mask_in, bool training,
                                                          double eps, const std::vector<bool>& output_mask) {
  const char* const op = "batch_norm_bwd";
  const Array meta(x_in);
  const Layout layout(op, meta);
  auto a = describe<BatchNormBwd>(op, meta, layout, eps);
  STD_TORCH_CHECK(output_mask.size() == 4, op, ": output_mask must have 4 entries, got ", output_mask.size());
  STD_TORCH_CHECK(mask_in.has_value() || !output_mask[3], op, ": without a mask the gradient of residual is dy");
  const int64_t channels = meta.sizes[1];
  const Operand w(op, "weight", weight, channels), mu(op, "mean", mean, channels), sigma(op, "var", var, channels);
  const Dense x = layout.dense_in(op, "x", x_in, meta, a.dtype), dy = layout.dense_in(op, "dy", dy_in, a.dtype);
  std::optional<Tensor> mask;
  if (mask_in.has_value()) {
    mask = as_contiguous(*mask_in);
    const Array bits(*mask);
    STD_TORCH_CHECK(bits.dtype == Dtype::kUInt8 && bits.numel() == a.shape.mask_bytes(), op,
                    ": mask must be uint8 with ", a.shape.mask_bytes(), " elements, got ", bits.numel());
    a.mask = static_cast<const uint8_t*>(bits.data);
  }
  const Dtype compute = compute_dtype(a.dtype);
  Output dx = output_mask[0] ? empty_like(layout, a.dtype) : empty_vector(0, a.dtype);
  Output dweight = empty_vector(output_mask[1] ? channels : 0, compute);
  Output dbias = empty_vector(output_mask[2] ? channels : 0, compute);
  Output dresidual = output_mask[3] ? empty_like(layout, a.dtype) : empty_vector(0, a.dtype);
  if (a.shape.numel() == 0) {
    for (const Output* out : {&dweight, &dbias}) {
      const int64_t n = Array(out->tensor).numel();
      if (n > 0) std::memset(out->data, 0, size_t(n * size_of(compute)));
    }
  } else {
    a.x = x.data;
    a.dy = dy.data;
    a.weight = w.value;
    a.mean = mu.value;
    a.var = sigma.value;
    a.dx = output_mask[0] ? dx.data : nullptr;
    a.dweight = output_mask[1] ? dweight.data : nullptr;
    a.dbias = output_mask[2] ? dbias.data : nullptr;
    a.dresidual = output_mask[3] ? dresidual.data : nullptr;
    a.training = training;
    run_backward(a, output_mask[1] || output_mask[2] || (training && output_mask[0]));
  }
  return {std::move(dx.tensor), std::move(dweight.tensor), std::move(dbias.tensor), std::move(dresidual.tensor)};
}

// dx from sums that were taken elsewhere, divided by the number of values they stand for.
Tensor batch_norm_dx(const Tensor& dy_in, const Tensor& x_in, const Tensor& mean, const Tensor& var,
                     const std::optional<Tensor>& weight, const Tensor& dweight, const Tensor& dbias, double eps) {
  const char* const op = "batch_norm_dx";
  const Array meta(x_in);
  const Layout layout(op, meta);
  auto a = describe<BatchNormBwd>(op, meta, layout, eps);
  const int64_t channels = meta.sizes[1];
  const Operand w(op, "weight", weight, channels), mu(op, "mean", mean, channels), sigma(op, "var", var, channels);
  const Operand dw(op, "dweight", dweight, channels), db(op, "dbias", dbias, channels);
  const Dense x = layout.dense_in(op, "x", x_in, meta, a.dtype), dy = layout.dense_in(op, "dy", dy_in, a.dtype);
  Output dx = empty_like(layout, a.dtype);
  if (a.shape.numel() > 0) {
    a.x = x.data;
    a.dy = dy.data;
    a.weight = w.value;
    a.mean = mu.value;
    a.var = sigma.value;
    a.mean_dy_xhat = dw.value;
    a.mean_dy = db.value;
    a.dx = dx.data;
    a.training = true;
    run_backward(a, false);
  }
  return std::move(dx.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_norm_bwd));
  m.impl("batch_norm_dx", TORCH_BOX(&batch_norm_dx));
}

}  // namespace
}  // namespace pydl

#endif
