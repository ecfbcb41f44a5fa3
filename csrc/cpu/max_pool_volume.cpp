// Max pooling of volumes, forward, contiguous layout: every depth is pooled as a plane, then the depths of each window
// are compared, in ascending order, so that the first maximum in row-major order wins.

#include "cpu/max_pool_window.h"

namespace pydl::PYDL_ISA {

void max_pool_tiles(const PoolFwd& a, void* scratch, int64_t begin, int64_t end);
void max_pool_uneven(const PoolFwd& a, void* scratch, int64_t begin, int64_t end);

namespace {

// The maxima of a volume's depths: [d.in][n] values, and numbers of taps or positions in the plane.
template <class T>
struct Slices {
  const T* values;
  const uint8_t* taps;
  const int64_t* places;
  int64_t n;
};

// Compares the depths of output depth od and writes its n outputs, of which the first is number `position`.
template <bool INDEX, class T, class C>
void compare_depths(const PoolFwd& a, const Slices<T>& slices, int64_t od, int64_t position) {
  const PoolShape& s = a.shape;
  const Span<int64_t> taps = inner_taps(s.d, od);
  const int64_t start = window_start(s.d, od), n = slices.n, plane_taps = s.h.kernel * s.w.kernel;
  const bool bytes = INDEX && !a.flat;
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    Best<C, INDEX, true> best{splat(-kInfinity<C>), splat_int<C>(bytes ? taps.first * plane_taps : taps.first)};
    for (int64_t tap = taps.first; tap < taps.last; ++tap) {
      const int64_t from = (start + tap * s.d.dilation) * n + i;
      IntVec<C> number = splat_int<C>(tap);
      if (bytes) number = load_bytes<C>(slices.taps + from, extent) + splat_int<C>(tap * plane_taps);
      const Vec<C> v = load(slices.values + from, extent);
      if (tap == taps.first) {
        best = {v, number};
      } else {
        best.take(v, number);
      }
    }
    store(static_cast<T*>(a.y) + position + i, best.value, extent);
    if constexpr (INDEX) {
      if (bytes) {
        store_bytes<C>(static_cast<uint8_t*>(a.indices) + position + i, best.tap, extent);
        return;
      }
      for (int64_t lane = 0; lane < lanes_in<C>(extent); ++lane) {
        const int64_t depth = start + best.tap[lane] * s.d.dilation;
        const bool inside = depth >= 0 && depth < s.d.in;
        static_cast<int64_t*>(a.indices)[position + i + lane] =
            depth * s.h.in * s.w.in + (inside ? slices.places[depth * n + i + lane] : 0);
      }
    }
  });
}

template <class T, class C>
void volumes(const PoolFwd& a, void* scratch, int64_t begin, int64_t end) {
  const PoolShape& s = a.shape;
  const int64_t n = s.h.out * s.w.out;
  T* values = reinterpret_cast<T*>(static_cast<char*>(scratch) + a.tile_bytes);
  const int64_t value_bytes = (s.d.in * n * int64_t(sizeof(T)) + 7) / 8 * 8;
  char* indices = reinterpret_cast<char*>(values) + value_bytes;
  PoolFwd slice = a;
  slice.shape.batch = 1;
  slice.shape.channels = s.d.in;
  slice.y = values;
  if (a.indices != nullptr) slice.indices = indices;
  const Slices<T> slices{values, reinterpret_cast<const uint8_t*>(indices), reinterpret_cast<const int64_t*>(indices),
                         n};
  for (int64_t plane = begin; plane < end; ++plane) {
    slice.x = static_cast<const T*>(a.x) + plane * s.d.in * s.h.in * s.w.in;
    if (uneven(s)) {
      max_pool_uneven(slice, scratch, 0, s.d.in * s.h.out);
    } else {
      max_pool_tiles(slice, scratch, 0, s.d.in * a.slice_tiles);
    }
    for (int64_t od = 0; od < s.d.out; ++od) {
      const int64_t position = (plane * s.d.out + od) * n;
      a.indices == nullptr ? compare_depths<false, T, C>(a, slices, od, position)
                           : compare_depths<true, T, C>(a, slices, od, position);
    }
  }
}

}  // namespace

// Volumes [begin, end); `scratch` holds a tile's buffers and the maxima of all depths of a volume.
void max_pool_volumes(const PoolFwd& a, void* scratch, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, volumes<T, compute_t<T>>(a, scratch, begin, end));
}

}  // namespace pydl::PYDL_ISA
