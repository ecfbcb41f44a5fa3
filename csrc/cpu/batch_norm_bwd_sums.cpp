// Batch normalisation, backward: per channel the sums of dz, the gradient behind the activation's mask, and of
// dz * (x - mean). They run over the chunks of the forward and are merged in double, in their order.

#include "cpu/batch_norm_kernels.h"

namespace pydl::PYDL_ISA {
namespace {

// ---- sums over planes

template <class T>
inline void prefetch(const T* p, int64_t n) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) / 64 * 64, last = reinterpret_cast<uintptr_t>(p + n);
  for (uintptr_t line = first; line < last; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(line));
}

template <bool MASK, class T, class C>
void plane_sums(const BatchNormBwd& a, int64_t channel, int64_t chunk) {
  const Cut& cut = a.cut;
  const C mean = static_cast<const C*>(a.coefficients)[channel];
  const int64_t first = chunk * cut.chunk_items, last = smaller(first + cut.chunk_items, cut.items);
  double total = 0, along = 0;
  Vec<C> t[4] = {}, p[4] = {};
  int64_t held = 0;
  const auto flush = [&] {
    total += double(sum(add_up(t)));
    along += double(sum(add_up(p)));
    for (int slot = 0; slot < 4; ++slot) t[slot] = p[slot] = Vec<C>{};
    held = 0;
  };
  each_piece(a.shape, cut, channel, first, last, [&](const Piece& piece) {
    for (int64_t start = 0; start < piece.n; start += kSumBlock) {
      const T* x = static_cast<const T*>(a.x) + piece.offset + start;
      const T* dy = static_cast<const T*>(a.dy) + piece.offset + start;
      const uint8_t* mask =
          MASK ? a.mask + piece.plane * ((a.shape.inner + 7) / 8) + (piece.start + start) / 8 : nullptr;
      const int64_t n = smaller(kSumBlock, piece.n - start);
      sweep<C>(n, [&](int64_t i, int slot, auto extent) {
        fetch_ahead(dy + i);
        fetch_ahead(x + i);
        const Vec<C> dz = load_dz<MASK, T, C>(dy, mask, i, extent);
        t[slot] += dz;
        p[slot] += dz * (load(x + i, extent, splat(mean)) - mean);  // a missing lane is 0: 0 * inf would leave a NaN
      });
      held += n;
      if (held >= kSumBlock) flush();
    }
  });
  flush();
  double* out = a.partial + (channel * cut.chunks + chunk) * 2;
  out[0] = total;
  out[1] = along;
}

// The same of `count` neighbouring channels of short planes, which are one run of memory in each sample.
template <bool MASK, class T, class C>
void short_plane_sums(const BatchNormBwd& a, int64_t channel, int64_t count, int64_t chunk) {
  constexpr int64_t kSamplesAhead = 2;
  const Cut& cut = a.cut;
  const int64_t channels = a.shape.channels, inner = a.shape.inner;
  const C* mean = static_cast<const C*>(a.coefficients) + channel;
  double total[kChannelsAtOnce] = {}, along[kChannelsAtOnce] = {};
  Vec<C> t[kChannelsAtOnce] = {}, p[kChannelsAtOnce] = {};
  int64_t held = 0;
  const auto flush = [&] {
    for (int64_t k = 0; k < count; ++k) {
      total[k] += double(sum(t[k]));
      along[k] += double(sum(p[k]));
      t[k] = p[k] = Vec<C>{};
    }
    held = 0;
  };
  const int64_t first = chunk * cut.chunk_items, last = smaller(first + cut.chunk_items, cut.items);
  for (int64_t o = first; o < last; ++o) {
    const int64_t plane = o * channels + channel;
    const T *x = static_cast<const T*>(a.x) + plane * inner, *dy = static_cast<const T*>(a.dy) + plane * inner;
    prefetch(x + kSamplesAhead * channels * inner, count * inner);
    prefetch(dy + kSamplesAhead * channels * inner, count * inner);
    for (int64_t k = 0; k < count; ++k, x += inner, dy += inner) {
      const uint8_t* mask = MASK ? a.mask + (plane + k) * ((inner + 7) / 8) : nullptr;
      const Vec<C> middle = splat(mean[k]);
      Vec<C> dz_sum = t[k], dot = p[k];
      sweep<C>(inner, [&](int64_t i, int, auto extent) {
        const Vec<C> dz = load_dz<MASK, T, C>(dy, mask, i, extent);
        dz_sum += dz;
        dot += dz * (load(x + i, extent, middle) - middle);
      });
      t[k] = dz_sum;
      p[k] = dot;
    }
    held += inner;
    if (held >= kSumBlock / 4) flush();
  }
  flush();
  for (int64_t k = 0; k < count; ++k) {
    double* out = a.partial + ((channel + k) * cut.chunks + chunk) * 2;
    out[0] = total[k];
    out[1] = along[k];
  }
}

void merge_plane_sums(const BatchNormBwd& a, int64_t begin, int64_t n, double* total, double* along) {
  for (int64_t i = 0; i < n; ++i) {
    const double* partial = a.partial + (begin + i) * a.cut.chunks * 2;
    total[i] = along[i] = 0;
    for (int64_t k = 0; k < a.cut.chunks; ++k) {
      total[i] += partial[2 * k];
      along[i] += partial[2 * k + 1];
    }
  }
}

// ---- sums over rows

template <bool MASK, int R, class T, class C>
inline void add_rows(const BatchNormBwd& a, int64_t row, int64_t n, C* total, C* along) {
  const int64_t width = a.cut.width;
  const T *x = static_cast<const T*>(a.x) + row * width, *dy = static_cast<const T*>(a.dy) + row * width;
  const uint8_t* mask = MASK ? a.mask + row * width / 8 : nullptr;
  const C* mean = static_cast<const C*>(a.coefficients);
  sweep<C>(n, [&](int64_t i, int, auto extent) {
    const Vec<C> middle = load(mean + i, extent);
    Vec<C> t = {}, p = {};
    for (int r = 0; r < R; ++r) {
      const Vec<C> dz = load_dz<MASK, T, C>(dy + r * width, MASK ? mask + r * width / 8 : nullptr, i, extent);
      t += dz;
      p += dz * (load(x + r * width + i, extent) - middle);
    }
    store(total + i, load(total + i, extent) + t, extent);
    store(along + i, load(along + i, extent) + p, extent);
  });
}

template <bool MASK, class T, class C>
void row_sums(const BatchNormBwd& a, int64_t chunk, C* buffer) {
  const Cut& cut = a.cut;
  const bool rest = chunk == cut.chunks;  // what is left of the last wide row
  const int64_t n = rest ? cut.rest : cut.width;
  C *total = buffer, *along = buffer + cut.width;
  for (int64_t i = 0; i < n; ++i) total[i] = along[i] = 0;
  if (rest) {
    add_rows<MASK, 1, T>(a, cut.full, n, total, along);
  } else {
    int64_t row = chunk * cut.chunk_rows;
    const int64_t last = smaller(row + cut.chunk_rows, cut.full);
    for (; row + 8 <= last; row += 8) add_rows<MASK, 8, T>(a, row, n, total, along);
    for (; row < last; ++row) add_rows<MASK, 1, T>(a, row, n, total, along);
  }
  double* out = a.partial + chunk * 2 * cut.width;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = total[i];
    out[cut.width + i] = along[i];
  }
}

void merge_row_sums(const BatchNormBwd& a, int64_t begin, int64_t n, double* total, double* along) {
  const Cut& cut = a.cut;
  for (int64_t i = 0; i < n; ++i) total[i] = along[i] = 0;
  for (int64_t chunk = 0; chunk < cut.chunks + (cut.rest > 0); ++chunk) {
    const int64_t width = chunk == cut.chunks ? cut.rest : cut.width;
    for (int64_t copy = 0; copy < width; copy += a.shape.channels) {
      const double* partial = a.partial + chunk * 2 * cut.width + copy + begin;
      for (int64_t i = 0; i < n; ++i) total[i] += partial[i];
      for (int64_t i = 0; i < n; ++i) along[i] += partial[cut.width + i];
    }
  }
}

// ---- coefficients: mean, along, slope, scale

template <class C>
void write_coefficients(const BatchNormBwd& a, int64_t begin, int64_t n, const double* total, const double* dot) {
  double weight[kBlock], mean[kBlock], var[kBlock];
  widen_parameter(a.weight, 1.0, weight, begin, n);
  widen_parameter(a.mean, 0.0, mean, begin, n);
  widen_parameter(a.var, 1.0, var, begin, n);
  C* table = static_cast<C*>(a.coefficients);
  const int64_t width = a.cut.width, channels = a.shape.channels;
  for (int64_t i = 0; i < n; ++i) {
    const double rstd = 1 / __builtin_sqrt(var[i] + a.eps);
    const int64_t c = begin + i;
    if (a.dbias != nullptr) static_cast<C*>(a.dbias)[c] = C(total[i]);
    if (a.dweight != nullptr) static_cast<C*>(a.dweight)[c] = C(dot[i] * rstd);
    const double each = a.training && a.mean_dy.data == nullptr ? 1 / double(a.shape.per_channel()) : 1.0;
    spread(table, width, channels, c, C(mean[i]));
    spread(table + width, width, channels, c, C(total[i] * each));
    spread(table + 2 * width, width, channels, c, C(dot[i] * each * rstd * rstd));
    spread(table + 3 * width, width, channels, c, C(weight[i] * rstd));
  }
}

}  // namespace

// Sums of chunks (planes: channel * chunks + chunk); the buffer holds two wide rows of the compute type.
void batch_norm_bwd_sums(const BatchNormBwd& a, void* buffer, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (a.shape.rows()) {
      PYDL_FLOAT_SWITCH(a.dtype, a.mask != nullptr ? row_sums<true, T>(a, i, static_cast<compute_t<T>*>(buffer))
                                                   : row_sums<false, T>(a, i, static_cast<compute_t<T>*>(buffer)));
    } else {
      const int64_t channel = i / a.cut.chunks, chunk = i % a.cut.chunks;
      if (short_planes(a.shape)) {
        batch_norm_bwd_short_sums(a, channel, 1, chunk);
        continue;
      }
      PYDL_FLOAT_SWITCH(a.dtype, a.mask != nullptr ? plane_sums<true, T, compute_t<T>>(a, channel, chunk)
                                                   : plane_sums<false, T, compute_t<T>>(a, channel, chunk));
    }
  }
}

void batch_norm_bwd_short_sums(const BatchNormBwd& a, int64_t channel, int64_t count, int64_t chunk) {
  PYDL_FLOAT_SWITCH(a.dtype, a.mask != nullptr ? short_plane_sums<true, T, compute_t<T>>(a, channel, count, chunk)
                                               : short_plane_sums<false, T, compute_t<T>>(a, channel, count, chunk));
}

// dweight, dbias and the coefficients of channels [begin, end), from the partial sums, from given ones, or from none.
void batch_norm_bwd_merge(const BatchNormBwd& a, int64_t begin, int64_t end) {
  double total[kBlock], along[kBlock];
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t n = smaller(kBlock, end - c);
    if (a.partial == nullptr) {
      widen_parameter(a.mean_dy, 0.0, total, c, n);
      widen_parameter(a.mean_dy_xhat, 0.0, along, c, n);
      double var[kBlock];
      widen_parameter(a.var, 1.0, var, c, n);
      for (int64_t i = 0; i < n; ++i) along[i] *= __builtin_sqrt(var[i] + a.eps);
    } else if (a.shape.rows()) {
      merge_row_sums(a, c, n, total, along);
    } else {
      merge_plane_sums(a, c, n, total, along);
    }
    PYDL_FLOAT_SWITCH(a.dtype, write_coefficients<compute_t<T>>(a, c, n, total, along));
  }
}

// The means of channels [begin, end), which the sums need, into the coefficients.
void batch_norm_bwd_means(const BatchNormBwd& a, int64_t begin, int64_t end) {
  double mean[kBlock];
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t n = smaller(kBlock, end - c);
    widen_parameter(a.mean, 0.0, mean, c, n);
    for (int64_t i = 0; i < n; ++i) {
      PYDL_FLOAT_SWITCH(a.dtype, spread(static_cast<compute_t<T>*>(a.coefficients), a.cut.width, a.shape.channels,
                                        c + i, compute_t<T>(mean[i])));
    }
  }
}

}  // namespace pydl::PYDL_ISA
