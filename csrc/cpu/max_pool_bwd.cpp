// Max pooling, backward and its derivative.
//
// Backward: a thread owns whole planes, or images in the channels-last layout, and adds the gradients of their outputs
// in order. Where there are many channels and few taps, max_pool_bwd_channels_last.cpp adds them up the other way
// round, in the same order. No element is written by two threads, so results do not depend on them. Indices that lie
// outside the plane are skipped.

#include "common/pool.h"
#include "common/vec.h"

namespace pydl {
namespace {

inline constexpr int64_t kSmallPlane = 1024;  // elements

}  // namespace

namespace PYDL_ISA {
namespace {

// Where a stored index points: from an offset (number of a tap) or a flat position.
class Resolver {
 public:
  explicit Resolver(const PoolBwd& a)
      : d_(a.shape.d),
        h_(a.shape.h),
        w_(a.shape.w),
        d_span_((d_.kernel - 1) * d_.dilation),
        h_span_((h_.kernel - 1) * h_.dilation),
        gaps_(jumps(d_) || jumps(h_) || jumps(w_)) {
    const int64_t inner = a.shape.channels_last ? a.shape.channels : 1;
    if (a.flat) return;
    taps_ = smaller(255, smaller(256, d_.kernel) * smaller(256, h_.kernel * w_.kernel));
    for (int64_t tap = 0; tap < 256; ++tap) {
      const int64_t i = tap / (w_.kernel * h_.kernel), j = tap / w_.kernel % h_.kernel, k = tap % w_.kernel;
      const bool exists = i < d_.kernel;
      depth_[tap] = exists ? i * d_.dilation : kNowhere;
      row_[tap] = exists ? j * h_.dilation : kNowhere;
      col_[tap] = exists ? k * w_.dilation : kNowhere;
      const uint64_t plane = uint64_t(depth_[tap]) * uint64_t(h_.in) + uint64_t(row_[tap]);
      const uint64_t step = (plane * uint64_t(w_.in) + uint64_t(col_[tap])) * uint64_t(inner);
      step_[tap] = exists ? int64_t(step) : kNowhere;
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
  // The outputs that follow are those whose windows start at this depth and row.
  void enter_row(int64_t depth, int64_t row) {
    const int64_t last_depth = depth + d_span_, last_row = row + h_span_;
    origin_ = (depth * h_.in + row) * w_.in;
    reach_ = (smaller(last_depth, d_.in - 1) * h_.in + smaller(last_row, h_.in - 1) + 1) * w_.in;
    steps_ = step_;
    if (within(d_, depth, last_depth) && within(h_, row, last_row)) return;
    steps_ = border_;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const bool inside =
          uint64_t(depth + depth_[tap]) < uint64_t(d_.in) && uint64_t(row + row_[tap]) < uint64_t(h_.in);
      border_[tap] = inside ? step_[tap] : kNowhere;
    }
  }
  // Pixel of the row that a window over column 0 begins with, and the elements from there to an offset's.
  int64_t origin() const { return origin_; }
  const int64_t* steps() const { return steps_; }
  // Whether the offset of a window that starts at this column points to a column of the input.
  bool in_columns(uint8_t tap, int64_t start) const { return uint64_t(start + col_[tap]) < uint64_t(w_.in); }
  // Pixels of the image up to the last that offsets of the row point to.
  int64_t reach() const { return reach_; }

 private:
  static bool jumps(const PoolDim& d) { return d.dilation > d.in; }
  // The bound on an adaptive window's taps may reach past the end, its taps do not.
  static bool within(const PoolDim& d, int64_t first, int64_t last) {
    return d.adaptive || (first >= 0 && last < d.in);
  }
  static bool reaches(const PoolDim& d, int64_t o) {
    const Span<int64_t> taps = inner_taps(d, o);
    return taps.first < taps.last;
  }

  static constexpr int64_t kNowhere = -(int64_t(1) << 62);
  const PoolDim d_, h_, w_;
  const int64_t d_span_, h_span_;
  const bool gaps_;
  int64_t depth_[256], row_[256], col_[256], step_[256], border_[256];
  const int64_t* steps_ = step_;
  int64_t origin_ = 0, reach_ = 0, taps_ = 0;
};

// Outputs [first, last) whose windows lie inside the input along one dimension.
inline Span<int64_t> interior(const PoolDim& d) {
  if (d.adaptive) return {0, d.out};
  const int64_t first = smaller(ceil_div(d.padding, d.stride), d.out);
  const int64_t last = floor_div(d.in - 1 - (d.kernel - 1) * d.dilation + d.padding, d.stride) + 1;
  return {first, larger(first, smaller(last, d.out))};
}

// ---- backward, a plane or an image at a time

// Sets sums to zero a little ahead of the additions, so that they are in the nearest cache when those come.
template <class C>
class Cleaner {
  static constexpr int64_t kStretch = 256;

 public:
  Cleaner(C* sums, int64_t n) : sums_(sums), n_(n) {}
  void reach(int64_t wanted) {
    if (wanted <= clean_) return;
    const int64_t from = clean_;
    clean_ = smaller(n_, larger(wanted, from + kStretch));
    sweep<C>(clean_ - from, [&](int64_t i, int, auto extent) { store(sums_ + from + i, Vec<C>{}, extent); });
  }

 private:
  C* const sums_;
  const int64_t n_;
  int64_t clean_ = 0;
};

// A plane, or an image with all its channels if LAST: its outputs and where they are added up.
template <bool LAST, class I, class T, class C>
struct Scatter {
  const T* dy;
  const I* index;
  C* sums;
  int64_t inputs, channels;

  int64_t inner() const { return LAST ? channels : 1; }
  void add(int64_t at, int64_t o) const {
    if (uint64_t(at) < uint64_t(inputs)) sums[at] += to_compute(dy[o]);
  }
};

// The windows of a row: the elements before each, and which of them lie inside the input.
struct RowWindows {
  const PoolDim w;
  const int64_t* starts;
  const Span<int64_t> inside;
};

// Adds the outputs of row (od, oh), of which o is the first.
template <bool LAST, class T, class C>
void scatter_row(const Scatter<LAST, uint8_t, T, C>& p, const RowWindows& r, const Resolver& resolve, int64_t, int64_t,
                 int64_t o) {
  const int64_t origin = resolve.origin() * p.inner(), *steps = resolve.steps();
  int64_t ow = 0;
  const auto border = [&](int64_t last) {
    for (; ow < last; ++ow) {
      for (int64_t c = 0; c < p.inner(); ++c, ++o) {
        const uint8_t tap = p.index[o];
        if (resolve.in_columns(tap, window_start(r.w, ow))) p.add(origin + r.starts[ow] + steps[tap] + c, o);
      }
    }
  };
  border(r.inside.first);
  for (; ow < r.inside.last; ++ow) {
    const int64_t from = origin + r.starts[ow];
    for (int64_t c = 0; c < p.inner(); ++c, ++o) p.add(from + steps[p.index[o]] + c, o);
  }
  border(r.w.out);
}
template <bool LAST, class T, class C>
void scatter_row(const Scatter<LAST, int64_t, T, C>& p, const RowWindows& r, const Resolver& resolve, int64_t od,
                 int64_t oh, int64_t o) {
  for (int64_t ow = 0; ow < r.w.out; ++ow) {
    for (int64_t c = 0; c < p.inner(); ++c, ++o) p.add(resolve(p.index[o], od, oh, ow) * p.inner() + c, o);
  }
}

// Items are planes or images; `scratch` has room for the windows' starts and, if T is not the compute type, the sums of
// one item.
template <bool LAST, class I, class T, class C>
void scatter_items(const PoolBwd& a, void* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t inner = LAST ? s.channels : 1, row_outputs = s.w.out * inner;
  const int64_t inputs = s.d.in * s.h.in * s.w.in * inner, outputs = s.d.out * s.h.out * row_outputs;
  Resolver resolve(a);
  int64_t *const depths = static_cast<int64_t*>(scratch), *const heights = depths + s.d.out;
  int64_t* const starts = heights + s.h.out;
  for (int64_t od = 0; od < s.d.out; ++od) depths[od] = window_start(s.d, od);
  for (int64_t oh = 0; oh < s.h.out; ++oh) heights[oh] = window_start(s.h, oh);
  for (int64_t ow = 0; ow < s.w.out; ++ow) starts[ow] = window_start(s.w, ow) * inner;
  const RowWindows windows{s.w, starts, interior(s.w)};
  for (int64_t item = begin; item < end; ++item) {
    T* const dx = static_cast<T*>(a.dx) + item * inputs;
    C* sums = reinterpret_cast<C*>(starts + s.w.out);
    if constexpr (is_same<T, C>) sums = dx;
    const Scatter<LAST, I, T, C> p{static_cast<const T*>(a.dy) + item * outputs,
                                   static_cast<const I*>(a.indices) + item * outputs, sums, inputs, s.channels};
    Cleaner<C> clean(sums, inputs);
    if (sizeof(I) > 1) clean.reach(inputs);  // flat positions may be anywhere
    int64_t od = 0, oh = 0;
    for (int64_t o = 0; o < outputs; o += row_outputs) {
      resolve.enter_row(depths[od], heights[oh]);
      clean.reach(resolve.reach() * inner);
      scatter_row(p, windows, resolve, od, oh, o);
      if (++oh == s.h.out) oh = 0, ++od;
    }
    clean.reach(inputs);
    if constexpr (!is_same<T, C>) {
      sweep<C>(inputs, [&](int64_t i, int, auto extent) { store(dx + i, load(sums + i, extent), extent); });
    }
  }
}

// Offsets in planes so small that the preparation of a row would take most of the time: every window's first pixel is
// found once for all planes.
template <class T>
void scatter_small_planes(const PoolBwd& a, void* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t inputs = s.d.in * s.h.in * s.w.in, outputs = s.d.out * s.h.out * s.w.out;
  const Resolver resolve(a);
  int64_t* const starts = static_cast<int64_t*>(scratch);
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t row = o / s.w.out, depth = window_start(s.d, row / s.h.out);
    starts[o] = (depth * s.h.in + window_start(s.h, row % s.h.out)) * s.w.in + window_start(s.w, o % s.w.out);
  }
  const T* dy = static_cast<const T*>(a.dy) + begin * outputs;
  const uint8_t* index = static_cast<const uint8_t*>(a.indices) + begin * outputs;
  for (int64_t item = begin; item < end; ++item, dy += outputs, index += outputs) {
    T* const dx = static_cast<T*>(a.dx) + item * inputs;
    sweep<T>(inputs, [&](int64_t i, int, auto extent) { store(dx + i, Vec<T>{}, extent); });
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t at = starts[o] + resolve.steps()[index[o]];
      if (uint64_t(at) < uint64_t(inputs)) dx[at] += dy[o];
    }
  }
}

// Whether windows all lie inside a plane and there are at most kSmallPlane elements before and after pooling.
inline bool small_planes(const PoolShape& s) {
  const auto inside = [](const PoolDim& d) { return interior(d).first == 0 && interior(d).last == d.out; };
  const bool few = s.d.in * s.h.in * s.w.in <= kSmallPlane && s.d.out * s.h.out * s.w.out <= kSmallPlane;
  return few && inside(s.d) && inside(s.h) && inside(s.w);
}

template <class T, class C>
void scatter(const PoolBwd& a, void* scratch, int64_t begin, int64_t end) {
  const bool last = a.shape.channels_last;
  if constexpr (is_same<T, C>) {
    if (!last && !a.flat && small_planes(a.shape)) return scatter_small_planes<T>(a, scratch, begin, end);
  }
  if (a.flat) {
    last ? scatter_items<true, int64_t, T, C>(a, scratch, begin, end)
         : scatter_items<false, int64_t, T, C>(a, scratch, begin, end);
  } else {
    last ? scatter_items<true, uint8_t, T, C>(a, scratch, begin, end)
         : scatter_items<false, uint8_t, T, C>(a, scratch, begin, end);
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
void max_pool_scatter(const PoolBwd& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, scatter<T, compute_t<T>>(a, scratch, begin, end));
}

// Planes, or output rows of images in the channels-last layout, [begin, end).
void max_pool_pick(const PoolBwd& a, int64_t begin, int64_t end) {
  if (a.flat) {
    PYDL_FLOAT_SWITCH(a.dtype, pick_items<int64_t, T>(a, begin, end));
  } else {
    PYDL_FLOAT_SWITCH(a.dtype, pick_items<uint8_t, T>(a, begin, end));
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl

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
    // starts of windows, and the sums of one item
    const host::Scratch scratch((s.d.out + s.h.out + s.w.out + kSmallPlane) * 8 +
                                (compute == a.dtype ? 0 : inputs * host::size_of(compute)));
    PYDL_CPU_DISPATCH(max_pool_scatter)(a, scratch.get(), begin, end);
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
