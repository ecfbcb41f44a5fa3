// Max unpooling: every element goes to the position its index names, the rest is zero. Of several elements that name
// one position the last in row-major order stays, as with torch on one thread: a thread owns whole planes, or images in
// the channels-last layout. The backward reads the gradient at the positions.

#include "common/pool.h"
#include "common/vec.h"

namespace pydl {

struct Unpool {
  PoolShape shape;  // `in` is the larger side, as for the pooling that this undoes
  const void* x;
  const int64_t* indices;
  void* y;
  Dtype dtype;
  int64_t* wrong;  // an index outside the plane and whether there is one
};

namespace PYDL_ISA {
namespace {

// Items are planes, or images with all their channels if LAST.
template <bool LAST, class T>
void place_items(const Unpool& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t inner = LAST ? s.channels : 1, n = s.d.out * s.h.out * s.w.out;
  const int64_t pixels = s.d.in * s.h.in * s.w.in;
  for (int64_t item = begin; item < end; ++item) {
    T* y = static_cast<T*>(a.y) + item * pixels * inner;
    __builtin_memset(y, 0, size_t(pixels * inner) * sizeof(T));
    const T* x = static_cast<const T*>(a.x) + item * n * inner;
    const int64_t* index = a.indices + item * n * inner;
    for (int64_t i = 0; i < n; ++i, x += inner, index += inner) {
      for (int64_t c = 0; c < inner; ++c) {
        if (uint64_t(index[c]) < uint64_t(pixels)) {
          y[index[c] * inner + c] = x[c];
        } else {
          __atomic_store_n(a.wrong, index[c], __ATOMIC_RELAXED);
          __atomic_store_n(a.wrong + 1, int64_t(1), __ATOMIC_RELAXED);
        }
      }
    }
  }
}

template <class T>
void take_planes(const PoolBwd& a, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t n = s.d.out * s.h.out * s.w.out, pixels = s.d.in * s.h.in * s.w.in;
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* dy = static_cast<const T*>(a.dy) + plane * pixels;
    const int64_t* index = static_cast<const int64_t*>(a.indices) + plane * n;
    T* dx = static_cast<T*>(a.dx) + plane * n;
    for (int64_t i = 0; i < n; ++i) {
      dx[i] = uint64_t(index[i]) < uint64_t(pixels) ? dy[index[i]] : T{};
    }
  }
}

}  // namespace

// Planes [begin, end) of the contiguous layout: dx = dy at the indices.
void max_unpool_take(const PoolBwd& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, take_planes<T>(a, begin, end));
}

// Planes of the contiguous layout, or images of the channels-last layout, [begin, end).
void max_unpool_place(const Unpool& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype,
                    a.shape.channels_last ? place_items<true, T>(a, begin, end) : place_items<false, T>(a, begin, end));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, max_unpool_place, const Unpool&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_unpool_take, const PoolBwd&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, max_pool_pick, const PoolBwd&, int64_t, int64_t)

namespace {

Tensor max_unpool_fwd(const Tensor& x_in, const Tensor& indices_in, const Sizes& size) {
  const char* const op = "max_unpool_fwd";
  const PoolShape s = unpool_shape(op, x_in, indices_in, size.data(), int64_t(size.size()));
  const Tensor x = dense_in(x_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array meta(x), index(indices);
  Output y = empty_pool(s, false, meta.dtype);
  int64_t wrong[2] = {0, 0};
  const int64_t inner = s.channels_last ? s.channels : 1, items = s.batch * s.channels / std::max<int64_t>(inner, 1);
  const int64_t inputs = s.d.out * s.h.out * s.w.out * inner, outputs = s.d.in * s.h.in * s.w.in * inner;
  const Unpool a{s, meta.data, static_cast<const int64_t*>(index.data), y.data, meta.dtype, wrong};
  host::parallel(s.batch * s.channels == 0 ? 0 : items, inputs * 4 + outputs / 4,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_unpool_place)(a, begin, end); });
  STD_TORCH_CHECK(wrong[1] == 0, op, ": argument 'indices' must lie in planes of ", s.d.in * s.h.in * s.w.in,
                  " elements, got ", wrong[0]);
  return std::move(y.tensor);
}

Tensor max_unpool_bwd(const Tensor& dy_in, const Tensor& indices_in) {
  const char* const op = "max_unpool_bwd";
  const Array meta(dy_in);
  STD_TORCH_CHECK(meta.dim >= 3 && meta.dim <= 5, op, ": dy must have 3 to 5 dimensions, got ", meta.dim);
  const PoolShape s = unpool_shape(op, dy_in, indices_in, meta.sizes + 2, meta.dim - 2);
  const Tensor dy = dense_in(dy_in, s.channels_last), indices = dense_in(indices_in, s.channels_last);
  const Array grad(dy), index(indices);
  Output dx = empty_pool(s, true, grad.dtype);
  const PoolBwd a{s, grad.data, index.data, dx.data, true, grad.dtype};
  const int64_t rows = s.d.out * s.h.out;
  if (s.channels_last) {
    host::parallel(s.batch * rows, s.w.out * s.channels * 4,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_pool_pick)(a, begin, end); });
  } else {
    host::parallel(s.batch * s.channels, rows * s.w.out * 2,
                   [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(max_unpool_take)(a, begin, end); });
  }
  return std::move(dx.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) {
  m.impl("max_unpool_fwd", TORCH_BOX(&max_unpool_fwd));
  m.impl("max_unpool_bwd", TORCH_BOX(&max_unpool_bwd));
}

}  // namespace
}  // namespace pydl

#endif
