// Max pooling, backward and its derivative.
//
// Backward in the contiguous layout: a thread owns whole planes and adds the gradients of a plane's outputs in order.
// Channels-last layout: every input pixel gathers from the windows that cover it, vectorised over channels, in the same
// order; with few channels or many taps a thread owns whole images instead. No element is written by two threads, so
// results do not depend on them. Indices that lie outside the plane are skipped.

#include "common/pool.h"
#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

// Where a stored index points: from an offset (number of a tap) or a flat position.
class Resolver {
 public:
  explicit Resolver(const PoolBwd& a)
      : d_(a.shape.d), h_(a.shape.h), w_(a.shape.w), gaps_(jumps(d_) || jumps(h_) || jumps(w_)) {
    if (a.flat) return;
    taps_ = smaller(255, smaller(256, d_.kernel) * smaller(256, h_.kernel * w_.kernel));
    for (int64_t tap = 0; tap < 256; ++tap) {
      const int64_t i = tap / (w_.kernel * h_.kernel), j = tap / w_.kernel % h_.kernel, k = tap % w_.kernel;
      const bool exists = i < d_.kernel;
      depth_[tap] = exists ? i * d_.dilation : kNowhere;
      row_[tap] = exists ? j * h_.dilation : kNowhere;
      col_[tap] = exists ? k * w_.dilation : kNowhere;
      const uint64_t plane = uint64_t(depth_[tap]) * uint64_t(h_.in) + uint64_t(row_[tap]);
      step_[tap] = exists ? int64_t(plane * uint64_t(w_.in) + uint64_t(col_[tap])) : kNowhere;
      border_[tap] = kNowhere;
    }
  }

  // Position in the plane that the index of output (od, oh, ow) points to, negative if outside.
  int64_t operator()(uint8_t tap, int64_t od, int64_t oh, int64_t ow) const {
    const int64_t depth = window_start(d_, od) + depth_[tap], row = window_start(h_, oh) + row_[tap];
    const int64_t col = window_start(w_, ow) + col_[tap];
    const bool inside = uint64_t(depth) < uint64_t(d_.in) && uint64_t(row) < uint64_t(h_.in);
    return inside && uint64_t(col) < uint64_t(w_.in) ? (depth * h_.in + row) * w_.in + col : -1;
  }
  int64_t operator()(int64_t flat, int64_t od, int64_t oh, int64_t ow) const {
    if (uint64_t(flat) >= uint64_t(d_.in * h_.in * w_.in)) return -1;
    // A window whose taps all miss the input has a position in padding, which may look like another row's.
    return gaps_ && !(reaches(d_, od) && reaches(h_, oh) && reaches(w_, ow)) ? -1 : flat;
  }
  // The outputs that follow are those of row (od, oh).
  void enter_row(int64_t od, int64_t oh) {
    const int64_t depth = window_start(d_, od), row = window_start(h_, oh);
    origin_ = (depth * h_.in + row) * w_.in;
    steps_ = step_;
    if (within(d_, depth) && within(h_, row)) return;
    steps_ = border_;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const bool inside =
          uint64_t(depth + depth_[tap]) < uint64_t(d_.in) && uint64_t(row + row_[tap]) < uint64_t(h_.in);
      border_[tap] = inside ? step_[tap] : kNowhere;
    }
  }
  // Position that an index of the row points to, for a window whose columns lie inside the input; the end of the plane
  // is still to be checked.
  int64_t in_row(uint8_t tap, int64_t, int64_t, int64_t ow) const {
    return origin_ + window_start(w_, ow) + steps_[tap];
  }
  int64_t in_row(int64_t flat, int64_t od, int64_t oh, int64_t ow) const {
    return gaps_ ? (*this)(flat, od, oh, ow) : flat;
  }

 private:
  static bool jumps(const PoolDim& d) { return d.dilation > d.in; }
  static bool within(const PoolDim& d, int64_t start) {
    return start >= 0 && start + (d.kernel - 1) * d.dilation < d.in;
  }
  static bool reaches(const PoolDim& d, int64_t o) {
    const Span<int64_t> taps = inner_taps(d, o);
    return taps.first < taps.last;
  }

  static constexpr int64_t kNowhere = -(int64_t(1) << 62);
  const PoolDim d_, h_, w_;
  const bool gaps_;
  int64_t depth_[256], row_[256], col_[256], step_[256], border_[256];
  const int64_t* steps_ = step_;
  int64_t origin_ = 0, taps_ = 0;
};

// Outputs [first, last) whose windows lie inside the input along one dimension.
inline Span<int64_t> interior(const PoolDim& d) {
  if (d.adaptive) return {0, 0};  // the bound on the number of taps may reach past the end
  const int64_t first = smaller(ceil_div(d.padding, d.stride), d.out);
  const int64_t last = floor_div(d.in - 1 - (d.kernel - 1) * d.dilation + d.padding, d.stride) + 1;
  return {first, larger(first, smaller(last, d.out))};
}

// ---- backward, a plane or an image at a time

// Items are planes, or images with all their channels if LAST; `sums` holds one of the compute type unless that is T.
template <bool LAST, class I, class T, class C>
void scatter_items(const PoolBwd& a, C* sums, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t inner = LAST ? s.channels : 1, row_outputs = s.w.out * inner, rows = s.d.out * s.h.out;
  const int64_t pixels = s.d.in * s.h.in * s.w.in, inputs = pixels * inner;
  Resolver resolve(a);
  const Span<int64_t> cols = interior(s.w);
  for (int64_t item = begin; item < end; ++item) {
    const T* dy = static_cast<const T*>(a.dy) + item * rows * row_outputs;
    const I* index = static_cast<const I*>(a.indices) + item * rows * row_outputs;
    T* dx = static_cast<T*>(a.dx) + item * inputs;
    if constexpr (is_same<T, C>) sums = dx;
    sweep<C>(inputs, [&](int64_t i, int, auto extent) { store(sums + i, Vec<C>{}, extent); });
    if (!LAST && rows * s.w.out == 1) {  // a window for a plane: nothing to prepare for its neighbours
      const int64_t at = resolve(*index, 0, 0, 0);
      if (at >= 0) sums[at] += to_compute(*dy);
    }
    for (int64_t row = LAST || rows * s.w.out > 1 ? 0 : rows; row < rows;
         ++row, dy += row_outputs, index += row_outputs) {
      const int64_t od = row / s.h.out, oh = row % s.h.out;
      const auto add = [&](int64_t at, int64_t o, int64_t c) {
        if (uint64_t(at) < uint64_t(pixels)) sums[at * inner + c] += to_compute(dy[o]);
      };
      const auto border = [&](int64_t from, int64_t to) {
        for (int64_t ow = from, o = from * inner; ow < to; ++ow) {
          for (int64_t c = 0; c < inner; ++c, ++o) add(resolve(index[o], od, oh, ow), o, c);
        }
      };
      resolve.enter_row(od, oh);
      border(0, cols.first);
      for (int64_t ow = cols.first, o = cols.first * inner; ow < cols.last; ++ow) {
        for (int64_t c = 0; c < inner; ++c, ++o) add(resolve.in_row(index[o], od, oh, ow), o, c);
      }
      border(cols.last, s.w.out);
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

template <class C, class Extent>
inline Mask<C> points_to(const uint8_t* index, int64_t tap, Extent extent) {
  return equal(load_bytes<C>(index, extent), splat(int_t<C>(tap)));
}
template <class C, class Extent>
inline Mask<C> points_to(const int64_t* index, int64_t position, Extent extent) {
  return equal_int64<C>(index, position, extent);
}

// The windows that span one input pixel, and where it lies in the plane.
struct Pixel {
  int64_t n, id, ih, iw, place;
  Span<int64_t> depths, rows, cols;
};

// covering(d, i) from that of the input before it, without a division.
inline void advance(const PoolDim& d, int64_t i, Span<int64_t>& span) {
  if (d.adaptive) {
    span = covering(d, i);
    return;
  }
  const int64_t reach = i + d.padding;
  while (span.last < d.out && span.last * d.stride <= reach) ++span.last;
  while (span.first < span.last && span.first * d.stride + (d.kernel - 1) * d.dilation < reach) ++span.first;
}

// U vectors of channels of one input pixel.
template <int U, class I, class T, class C, class Extent>
inline void gather_channels(const PoolBwd& a, const Pixel& p, int64_t c, Extent extent) {
  const PoolShape& s = a.shape;
  Vec<C> sums[U] = {};
  for (int64_t od = p.depths.first; od < p.depths.last; ++od) {
    const int64_t i = tap_at(s.d, od, p.id);
    if (i < 0) continue;
    for (int64_t oh = p.rows.first; oh < p.rows.last; ++oh) {
      const int64_t j = tap_at(s.h, oh, p.ih);
      if (j < 0) continue;
      for (int64_t ow = p.cols.first; ow < p.cols.last; ++ow) {
        const int64_t k = tap_at(s.w, ow, p.iw);
        if (k < 0) continue;
        const int64_t from = (((p.n * s.d.out + od) * s.h.out + oh) * s.w.out + ow) * s.channels + c;
        const int64_t wanted = sizeof(I) == 1 ? (i * s.h.kernel + j) * s.w.kernel + k : p.place;
        for (int u = 0; u < U; ++u) {
          const int64_t at = from + u * kLanes<C>;
          const Mask<C> mask = points_to<C>(static_cast<const I*>(a.indices) + at, wanted, extent);
          sums[u] += select<C>(mask, load(static_cast<const T*>(a.dy) + at, extent), Vec<C>{});
        }
      }
    }
  }
  T* dx = static_cast<T*>(a.dx) + (p.n * s.d.in * s.h.in * s.w.in + p.place) * s.channels + c;
  for (int u = 0; u < U; ++u) store(dx + u * kLanes<C>, sums[u], extent);
}

// Items are input rows of images.
template <class I, class T, class C>
void gather_rows(const PoolBwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  constexpr int L = kLanes<C>;
  Pixel p;
  for (int64_t item = begin; item < end; ++item) {
    p.n = item / (s.h.in * s.d.in);
    p.id = item / s.h.in % s.d.in;
    p.ih = item % s.h.in;
    p.depths = covering(s.d, p.id);
    p.rows = covering(s.h, p.ih);
    p.cols = {0, 0};
    for (p.iw = 0; p.iw < s.w.in; ++p.iw) {
      advance(s.w, p.iw, p.cols);
      p.place = (p.id * s.h.in + p.ih) * s.w.in + p.iw;
      int64_t c = 0;
      for (; c + 16 * L <= s.channels; c += 16 * L) gather_channels<16, I, T, C>(a, p, c, Whole{});
      for (; c + 4 * L <= s.channels; c += 4 * L) gather_channels<4, I, T, C>(a, p, c, Whole{});
      for (; c + L <= s.channels; c += L) gather_channels<1, I, T, C>(a, p, c, Whole{});
      if (c < s.channels) gather_channels<1, I, T, C>(a, p, c, Part{s.channels - c});
    }
  }
}

// ---- the derivative of backward: y = x at the stored positions

// Items are planes, or output rows of images in the channels-last layout.
template <class I, class T>
void pick_items(const PoolBwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const Resolver resolve(a);
  const int64_t plane_rows = s.d.out * s.h.out, inner = s.channels_last ? s.channels : 1;
  const int64_t rows = s.channels_last ? 1 : plane_rows;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t outputs = item * rows * s.w.out * inner;
    const int64_t image = s.channels_last ? item / plane_rows : item;
    const T* x = static_cast<const T*>(a.dy) + image * s.d.in * s.h.in * s.w.in * inner;
    const I* index = static_cast<const I*>(a.indices) + outputs;
    T* y = static_cast<T*>(a.dx) + outputs;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = s.channels_last ? item % plane_rows : r, od = row / s.h.out, oh = row % s.h.out;
      for (int64_t ow = 0; ow < s.w.out; ++ow) {
        for (int64_t c = 0; c < inner; ++c, ++index, ++y) {
          const int64_t position = resolve(*index, od, oh, ow);
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

// Rows [begin, end) of the batch * d.in * h.in input rows of the channels-last layout.
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
  const int64_t inputs = s.d.in * s.h.in * s.w.in * inner, outputs = s.d.out * s.h.out * s.w.out * inner;
  host::parallel(items, inputs / 4 + outputs * 4, [&](int64_t begin, int64_t end) {
    const host::Scratch sums(compute == a.dtype ? 0 : inputs * host::size_of(compute));
    PYDL_CPU_DISPATCH(max_pool_scatter)(a, sums.get(), begin, end);
  });
}

// Whether pixels gather, with a look at every window that spans them, or outputs are added up one by one.
bool gathers(const PoolShape& s) {
  constexpr int64_t kFewChannels = 8, kManyTaps = 12;  // lanes of a vector left empty; looks for nothing
  return s.channels >= kFewChannels && taps_of(s) < kManyTaps;
}

Tensor max_pool_bwd(const Tensor& dy_in, const Tensor& indices_in, const Sizes& size, const Sizes& window) {
  const char* const op = "max_pool_bwd";
  const PoolShape s = index_shape(op, indices_in, size.data(), int64_t(size.size()), window);
  const Tensor dy = dense_in(dy_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array grad(dy), index(indices);
  STD_TORCH_CHECK(host::is_floating(grad.dtype), op, ": dy must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(grad.dim == index.dim && std::equal(grad.sizes, grad.sizes + grad.dim, index.sizes), op,
                  ": dy must have the shape of indices");
  Output dx = empty_pool(s, false, grad.dtype);
  if (s.batch * s.channels == 0) return std::move(dx.tensor);
  const PoolBwd a{s, grad.data, index.data, dx.data, index.dtype == Dtype::kInt64, grad.dtype};
  if (s.channels_last && gathers(s)) {
    host::parallel(s.batch * s.d.in * s.h.in, s.w.in * s.channels * 4,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_gather_rows)(a, begin, end); });
  } else {
    run_scatter(a);
  }
  return std::move(dx.tensor);
}

Tensor max_pool_gather(const Tensor& x_in, const Tensor& indices_in, const Sizes& window) {
  const char* const op = "max_pool_gather";
  const Array meta(x_in);
  STD_TORCH_CHECK(meta.dim >= 3 && meta.dim <= 5, op, ": x must have 3 to 5 dimensions, got ", meta.dim);
  STD_TORCH_CHECK(host::is_floating(meta.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  const PoolShape s = index_shape(op, indices_in, meta.sizes + 2, meta.dim - 2, window);
  STD_TORCH_CHECK(meta.sizes[0] == s.batch && meta.sizes[1] == s.channels, op, ": indices must have ", meta.sizes[0],
                  " x ", meta.sizes[1], " planes as x, got ", s.batch, " x ", s.channels);
  const Tensor x = dense_in(x_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array input(x), index(indices);
  Output y = empty_pool(s, true, meta.dtype);
  const PoolBwd a{s, input.data, index.data, y.data, index.dtype == Dtype::kInt64, meta.dtype};
  const int64_t rows = s.d.out * s.h.out, items = s.batch * (s.channels_last ? rows : s.channels);
  const int64_t outputs = s.w.out * (s.channels_last ? s.channels : rows);
  if (outputs > 0) {
    host::parallel(items, outputs * 4,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_pick)(a, begin, end); });
  }
  return std::move(y.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("max_pool_bwd", TORCH_BOX(&max_pool_bwd));
  m.impl("max_pool_gather", TORCH_BOX(&max_pool_gather));
}

}  // namespace
}  // namespace pydl

#endif
