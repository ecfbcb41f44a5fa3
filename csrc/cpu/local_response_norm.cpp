// Local response normalisation, forward (Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep
// convolutional neural networks", 2012). Planes are walked channel by channel in tiles that stay in the nearest cache,
// so that memory is read once; rows of channels are squared into a buffer between zeros.

#include "cpu/local_response_norm.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

template <bool ROOTS, class T, class C>
void fwd_tiles(const LrnArgs& a, int64_t begin, int64_t end) {
  const int64_t stride = a.norm.shape.inner;
  const Denominator<ROOTS, C> denominator(a.norm);
  for (int64_t item = begin; item < end; ++item) {
    const LrnTile t(a, item);
    const T* x = static_cast<const T*>(a.x) + t.base;
    T* y = static_cast<T*>(a.out) + t.base;
    for (int64_t c = t.first; c < t.last; ++c) {
      const int64_t low = larger(0, c - a.norm.before), high = smaller(a.norm.shape.channels, c + a.norm.after + 1);
      groups<C>(t.cols, [&]<int U>(int64_t i, auto extent) {
        Vec<C> squares[U];
        sum_squares<U>(x + low * stride + i, high - low, stride, extent, squares);
        for (int u = 0; u < U; ++u) {
          const int64_t at = c * stride + i + u * kLanes<C>;
          store(y + at, load(x + at, extent) * denominator.factor(denominator.base(squares[u])), extent);
        }
      });
    }
  }
}

template <bool ROOTS, class T, class C>
void fwd_rows(const LrnArgs& a, C* squares, int64_t begin, int64_t end) {
  const int64_t n = a.norm.shape.channels, window = a.norm.window;
  const Denominator<ROOTS, C> denominator(a.norm);
  clear(squares, a.padded);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * n;
    T* y = static_cast<T*>(a.out) + row * n;
    square_row(x, n, squares + a.norm.before);
    groups<C>(n, [&]<int U>(int64_t i, auto extent) {
      Vec<C> total[U];
      sum_window<U>(squares + i, window, total);
      for (int u = 0; u < U; ++u) {
        const int64_t at = i + u * kLanes<C>;
        store(y + at, load(x + at, extent) * denominator.factor(denominator.base(total[u])), extent);
      }
    });
  }
}

}  // namespace

// Tiles [begin, end) of planes.
void lrn_fwd_tiles(const LrnArgs& a, int64_t begin, int64_t end) {
  PYDL_LRN_SWITCH(a, fwd_tiles<ROOTS, T, compute_t<T>>(a, begin, end));
}

// Rows [begin, end) of channels; `buffer` holds one padded row of the compute type.
void lrn_fwd_rows(const LrnArgs& a, void* buffer, int64_t begin, int64_t end) {
  PYDL_LRN_SWITCH(a, fwd_rows<ROOTS, T>(a, static_cast<compute_t<T>*>(buffer), begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, lrn_fwd_tiles, const LrnArgs&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, lrn_fwd_rows, const LrnArgs&, void*, int64_t, int64_t)

namespace {

Tensor local_response_norm_fwd(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  const char* const op = "local_response_norm_fwd";
  const Array meta(x);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const Layout layout(op, meta);
  const Dense in = layout.dense_in(op, "x", x, meta, meta.dtype);
  Output y = host::empty_strided(layout.sizes, layout.strides, layout.dim, meta.dtype);
  LrnArgs args{response_norm(op, layout, size, alpha, beta, k), in.data, nullptr, y.data, meta.dtype};
  const Channels& s = args.norm.shape;
  if (s.numel() == 0) return std::move(y.tensor);
  choose_lrn_tile(args);
  const int64_t work = args.norm.window;
  if (s.rows()) {
    const int64_t bytes = args.padded * host::size_of(host::compute_dtype(meta.dtype));
    host::parallel(s.outer, s.channels * work, [&](int64_t begin, int64_t end) {
      const host::Scratch buffer(bytes);
      PYDL_CPU_DISPATCH(lrn_fwd_rows)(args, buffer.get(), begin, end);
    });
  } else {
    host::parallel(s.outer * args.col_tiles * args.row_tiles, args.cols * args.rows * work,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(lrn_fwd_tiles)(args, begin, end); });
  }
  return std::move(y.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("local_response_norm_fwd", TORCH_BOX(&local_response_norm_fwd)); }

}  // namespace
}  // namespace pydl

#endif
