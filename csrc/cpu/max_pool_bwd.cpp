// Max pooling, backward and its derivative.
//
// Backward in the contiguous layout: a thread owns whole planes and adds the gradients of a plane's outputs in order.
// Channels-last layout: every input pixel gathers from the windows that cover it, vectorised over channels, in the same
// order; with few channels a thread owns whole images instead. No element is written by two threads, so results do not
// depend on them. Indices that lie outside the plane are skipped.

#include "common/pool.h"
#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

// Where a stored index points: from an offset (number of a tap) or a flat position.
class Resolver {
 public:
  explicit Resolver(const PoolBwd& a)
      : h_(a.shape.h), w_(a.shape.w), gaps_(h_.dilation > h_.in || w_.dilation > w_.in) {
    if (a.flat) return;
    for (int64_t tap = 0; tap < 256; ++tap) {
      const bool exists = tap < h_.kernel * w_.kernel;
      row_[tap] = exists ? tap / w_.kernel * h_.dilation : kNowhere;
      col_[tap] = exists ? tap % w_.kernel * w_.dilation : kNowhere;
      step_[tap] = exists ? int64_t(uint64_t(row_[tap]) * uint64_t(w_.in) + uint64_t(col_[tap])) : kNowhere;
    }
  }

  // Position in the plane that the index of output (oh, ow) points to, negative if outside.
  int64_t operator()(uint8_t tap, int64_t oh, int64_t ow) const {
    const int64_t row = window_start(h_, oh) + row_[tap], col = window_start(w_, ow) + col_[tap];
    return uint64_t(row) < uint64_t(h_.in) && uint64_t(col) < uint64_t(w_.in) ? row * w_.in + col : -1;
  }
  int64_t operator()(int64_t flat, int64_t oh, int64_t ow) const {
    if (uint64_t(flat) >= uint64_t(h_.in * w_.in)) return -1;
    // A window whose taps all miss the input has a position in padding, which may look like another row's.
    return gaps_ && !(reaches(h_, oh) && reaches(w_, ow)) ? -1 : flat;
  }
  // The same for a window that lies inside the input as a whole.
  int64_t inside(uint8_t tap, int64_t oh, int64_t ow) const {
    return window_start(h_, oh) * w_.in + window_start(w_, ow) + step_[tap];
  }
  int64_t inside(int64_t flat, int64_t oh, int64_t ow) const { return (*this)(flat, oh, ow); }

 private:
  static int64_t window_start(const PoolDim& d, int64_t o) { return o * d.stride - d.padding; }
  static bool reaches(const PoolDim& d, int64_t o) {
    const int64_t start = window_start(d, o);
    return (start < 0 ? start + ceil_div(-start, d.dilation) * d.dilation : start) < d.in;
  }

  static constexpr int64_t kNowhere = -(int64_t(1) << 62);
  const PoolDim h_, w_;
  const bool gaps_;
  int64_t row_[256], col_[256], step_[256];
};

// Outputs [first, last) whose windows lie inside the input as a whole.
struct Interior {
  int64_t first, last;
};
inline Interior interior(const PoolDim& d) {
  const int64_t first = smaller(ceil_div(d.padding, d.stride), d.out);
  const int64_t last = floor_div(d.in - 1 - (d.kernel - 1) * d.dilation + d.padding, d.stride) + 1;
  return {first, larger(first, smaller(last, d.out))};
}

// ---- backward, a plane or an image at a time

// Items are planes, or images with all their channels if LAST; `sums` holds one of the compute type unless that is T.
template <bool LAST, class I, class T, class C>
void scatter_items(const PoolBwd& a, C* sums, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t inner = LAST ? s.channels : 1, row_outputs = s.w.out * inner, inputs = s.h.in * s.w.in * inner;
  const Resolver resolve(a);
  const Interior rows = interior(s.h), cols = interior(s.w);
  for (int64_t item = begin; item < end; ++item) {
    const T* dy = static_cast<const T*>(a.dy) + item * s.h.out * row_outputs;
    const I* index = static_cast<const I*>(a.indices) + item * s.h.out * row_outputs;
    T* dx = static_cast<T*>(a.dx) + item * inputs;
    if constexpr (is_same<T, C>) sums = dx;
    sweep<C>(inputs, [&](int64_t i, int, auto extent) { store(sums + i, Vec<C>{}, extent); });
    const auto add = [&](int64_t position, int64_t o, int64_t c) {
      if (position >= 0) sums[position * inner + c] += to_compute(dy[o]);
    };
    for (int64_t oh = 0; oh < s.h.out; ++oh, dy += row_outputs, index += row_outputs) {
      const bool row_inside = oh >= rows.first && oh < rows.last;
      const int64_t first = row_inside ? cols.first : s.w.out, last = row_inside ? cols.last : s.w.out;
      const auto border = [&](int64_t from, int64_t to) {
        for (int64_t ow = from; ow < to; ++ow) {
          for (int64_t c = 0, o = ow * inner; c < inner; ++c, ++o) add(resolve(index[o], oh, ow), o, c);
        }
      };
      border(0, first);
      for (int64_t ow = first; ow < last; ++ow) {
        for (int64_t c = 0, o = ow * inner; c < inner; ++c, ++o) add(resolve.inside(index[o], oh, ow), o, c);
      }
      border(last, s.w.out);
    }
    if constexpr (!is_same<T, C>) {
      sweep<C>(inputs, [&](int64_t i, int, auto extent) { store(dx + i, load(sums + i, extent), extent); });
    }
  }
}

template <class T, class C>
void scatter(const PoolBwd& a, C* sums, int64_t begin, int64_t end) {
  if (a.shape.channels_last) {
    a.flat ? scatter_items<true, int64_t, T>(a, sums, begin, end)
           : scatter_items<true, uint8_t, T>(a, sums, begin, end);
  } else {
    a.flat ? scatter_items<false, int64_t, T>(a, sums, begin, end)
           : scatter_items<false, uint8_t, T>(a, sums, begin, end);
  }
}

// ---- backward, channels-last layout

// Windows [first, last) of one dimension that span input position `in`; with a dilation some of them pass over it.
struct Covering {
  int64_t first, last;
};
inline Covering covering(const PoolDim& d, int64_t in) {
  const int64_t last = floor_div(in + d.padding, d.stride) + 1;
  const int64_t first = ceil_div(in + d.padding - (d.kernel - 1) * d.dilation, d.stride);
  return {larger(first, 0), smaller(last, d.out)};
}
// Tap of window o that reads input position `in`, -1 if it passes over it.
inline int64_t tap_at(const PoolDim& d, int64_t o, int64_t in) {
  const int64_t distance = in - (o * d.stride - d.padding);
  if (d.dilation == 1) return distance;
  return distance % d.dilation == 0 ? distance / d.dilation : -1;
}

template <class C, class Extent>
inline Mask<C> points_to(const uint8_t* index, int64_t tap, Extent extent) {
  return equal(load_bytes<C>(index, extent), splat(int_t<C>(tap)));
}
template <class C, class Extent>
inline Mask<C> points_to(const int64_t* index, int64_t position, Extent extent) {
  return equal_int64<C>(index, position, extent);
}

// U vectors of channels of one input pixel.
template <int U, class I, class T, class C, class Extent>
inline void gather_channels(const PoolBwd& a, int64_t n, int64_t ih, int64_t iw, Covering rows, Covering cols,
                            int64_t c, Extent extent) {
  const PoolShape& s = a.shape;
  Vec<C> sums[U] = {};
  for (int64_t oh = rows.first; oh < rows.last; ++oh) {
    const int64_t i = tap_at(s.h, oh, ih);
    if (i < 0) continue;
    for (int64_t ow = cols.first; ow < cols.last; ++ow) {
      const int64_t j = tap_at(s.w, ow, iw);
      if (j < 0) continue;
      const int64_t from = ((n * s.h.out + oh) * s.w.out + ow) * s.channels + c;
      const int64_t wanted = sizeof(I) == 1 ? i * s.w.kernel + j : ih * s.w.in + iw;
      for (int u = 0; u < U; ++u) {
        const int64_t at = from + u * kLanes<C>;
        const Mask<C> mask = points_to<C>(static_cast<const I*>(a.indices) + at, wanted, extent);
        sums[u] += select<C>(mask, load(static_cast<const T*>(a.dy) + at, extent), Vec<C>{});
      }
    }
  }
  T* dx = static_cast<T*>(a.dx) + ((n * s.h.in + ih) * s.w.in + iw) * s.channels + c;
  for (int u = 0; u < U; ++u) store(dx + u * kLanes<C>, sums[u], extent);
}

// Items are input rows of images.
template <class I, class T, class C>
void gather_rows(const PoolBwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  constexpr int L = kLanes<C>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / s.h.in, ih = item % s.h.in;
    const Covering rows = covering(s.h, ih);
    for (int64_t iw = 0; iw < s.w.in; ++iw) {
      const Covering cols = covering(s.w, iw);
      int64_t c = 0;
      for (; c + 16 * L <= s.channels; c += 16 * L) gather_channels<16, I, T, C>(a, n, ih, iw, rows, cols, c, Whole{});
      for (; c + 4 * L <= s.channels; c += 4 * L) gather_channels<4, I, T, C>(a, n, ih, iw, rows, cols, c, Whole{});
      for (; c + L <= s.channels; c += L) gather_channels<1, I, T, C>(a, n, ih, iw, rows, cols, c, Whole{});
      if (c < s.channels) gather_channels<1, I, T, C>(a, n, ih, iw, rows, cols, c, Part{s.channels - c});
    }
  }
}

// ---- the derivative of backward: y = x at the stored positions

// Items are planes, or output rows of images in the channels-last layout.
template <class I, class T>
void pick_items(const PoolBwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const Resolver resolve(a);
  const int64_t rows = s.channels_last ? 1 : s.h.out, inner = s.channels_last ? s.channels : 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t outputs = item * rows * s.w.out * inner;
    const int64_t image = s.channels_last ? item / s.h.out : item;
    const T* x = static_cast<const T*>(a.dy) + image * s.h.in * s.w.in * inner;
    const I* index = static_cast<const I*>(a.indices) + outputs;
    T* y = static_cast<T*>(a.dx) + outputs;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t oh = s.channels_last ? item % s.h.out : row;
      for (int64_t ow = 0; ow < s.w.out; ++ow) {
        for (int64_t c = 0; c < inner; ++c, ++index, ++y) {
          const int64_t position = resolve(*index, oh, ow);
          *y = position >= 0 ? x[position * inner + c] : T{};
        }
      }
    }
  }
}

}  // namespace

// Planes of the contiguous layout, or images of the channels-last layout, [begin, end).
void max_pool_scatter(const PoolBwd& a, void* sums, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, scatter<T>(a, static_cast<compute_t<T>*>(sums), begin, end));
}

// Rows [begin, end) of the batch * h.in input rows of the channels-last layout.
void max_pool_gather_rows(const PoolBwd& a, int64_t begin, int64_t end) {
  if (a.flat) {
    PYDL_FLOAT_SWITCH(a.dtype, gather_rows<int64_t, T, compute_t<T>>(a, begin, end));
  } else {
    PYDL_FLOAT_SWITCH(a.dtype, gather_rows<uint8_t, T, compute_t<T>>(a, begin, end));
  }
}

// Planes, or output rows of images in the channels-last layout, [begin, end).
void max_pool_pick(const PoolBwd& a, int64_t begin, int64_t end) {
  if (a.flat) {
    PYDL_FLOAT_SWITCH(a.dtype, pick_items<int64_t, T>(a, begin, end));
  } else {
    PYDL_FLOAT_SWITCH(a.dtype, pick_items<uint8_t, T>(a, begin, end));
  }
}

}  // namespace pydl::PYDL_ISA

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, max_pool_scatter, const PoolBwd&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_gather_rows, const PoolBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_pick, const PoolBwd&, int64_t, int64_t)

namespace {

// A thread owns planes, or images of few channels, and adds up its outputs.
void run_scatter(const PoolBwd& a) {
  const PoolShape& s = a.shape;
  const Dtype compute = host::compute_dtype(a.dtype);
  const int64_t items = s.channels_last ? s.batch : s.batch * s.channels, inner = s.channels_last ? s.channels : 1;
  const int64_t inputs = s.h.in * s.w.in * inner, outputs = s.h.out * s.w.out * inner;
  host::parallel(items, inputs / 4 + outputs * 4, [&](int64_t begin, int64_t end) {
    const host::Scratch sums(compute == a.dtype ? 0 : inputs * host::size_of(compute));
    PYDL_CPU_DISPATCH(max_pool_scatter)(a, sums.get(), begin, end);
  });
}

Tensor max_pool2d_bwd(const Tensor& dy_in, const Tensor& indices_in, int64_t height, int64_t width,
                      const Sizes& window) {
  const char* const op = "max_pool2d_bwd";
  const PoolShape s = index_shape(op, Array(indices_in), height, width, window);
  const Tensor dy = dense_in(dy_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array grad(dy), index(indices);
  STD_TORCH_CHECK(host::is_floating(grad.dtype), op, ": dy must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(grad.dim == 4 && std::equal(grad.sizes, grad.sizes + 4, index.sizes), op,
                  ": dy must have the shape of indices");
  Output dx = empty_pool(s, false, grad.dtype);
  if (s.batch * s.channels == 0) return std::move(dx.tensor);
  const PoolBwd a{s, grad.data, index.data, dx.data, index.dtype == Dtype::kInt64, grad.dtype};
  constexpr int64_t kFewChannels = 8;  // fewer leave most lanes of a vector empty
  if (s.channels_last && s.channels >= kFewChannels) {
    host::parallel(s.batch * height, width * s.channels * 4,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_gather_rows)(a, begin, end); });
  } else {
    run_scatter(a);
  }
  return std::move(dx.tensor);
}

Tensor max_pool2d_gather(const Tensor& x_in, const Tensor& indices_in, const Sizes& window) {
  const char* const op = "max_pool2d_gather";
  const Array meta(x_in);
  STD_TORCH_CHECK(meta.dim == 4, op, ": x must have 4 dimensions, got ", meta.dim);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const PoolShape s = index_shape(op, Array(indices_in), meta.sizes[2], meta.sizes[3], window);
  STD_TORCH_CHECK(meta.sizes[0] == s.batch && meta.sizes[1] == s.channels, op, ": indices must have ", meta.sizes[0],
                  " x ", meta.sizes[1], " planes as x, got ", s.batch, " x ", s.channels);
  const Tensor x = dense_in(x_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array input(x), index(indices);
  Output y = empty_pool(s, true, meta.dtype);
  const PoolBwd a{s, input.data, index.data, y.data, index.dtype == Dtype::kInt64, meta.dtype};
  const int64_t items = s.batch * (s.channels_last ? s.h.out : s.channels);
  const int64_t outputs = s.w.out * (s.channels_last ? s.channels : s.h.out);
  if (outputs > 0) {
    host::parallel(items, outputs * 4,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_pick)(a, begin, end); });
  }
  return std::move(y.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("max_pool2d_bwd", TORCH_BOX(&max_pool2d_bwd));
  m.impl("max_pool2d_gather", TORCH_BOX(&max_pool2d_gather));
}

}  // namespace
}  // namespace pydl

#endif
