// Group normalisation, backward. With dz the gradient behind the activation, which is found from x once more, D values
// in a group, xhat = (x - mean) * rstd and g = dz * weight:
//   dbias = sum dz,  dweight = sum dz * xhat,  dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd.
// The sums of dz and of dz * (x - mean) of each channel of each sample give the means over a group, and the gradients
// of the parameters by a sum over samples in their order.

#include "cpu/group_norm_kernels.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

template <class T>
struct Backward {
  using C = compute_t<T>;

  using Coefficients = GroupCoefficients<C>;

  static C* sums_of(const GroupNorm& a, int64_t n) { return group_sums<C>(a, n); }

  // What a channel of a group has in common.
  struct Constants {
    Vec<C> mean, rstd, weight, scale, shift;
    Constants(const GroupNorm& a, const Coefficients& of, int64_t c) {
      const C r = *of.rstd, w = static_cast<const C*>(a.weight)[c];
      mean = splat(*of.mean);
      rstd = splat(r);
      weight = splat(w);
      scale = splat(r * w);
      shift = splat(static_cast<const C*>(a.bias)[c]);
    }
  };

  // along and slope of groups [begin, end) from the sums of their channels.
  static void slopes(const GroupNorm& a, int64_t begin, int64_t end) {
    const double each = 1 / double(a.group_size());
    each_group(a, begin, end, [&](int64_t i, int64_t n, int64_t first, int64_t width) {
      const C *sums = sums_of(a, n) + first, *weight = static_cast<const C*>(a.weight) + first;
      double total = 0, dot = 0;
      for (int64_t k = 0; k < width; ++k) {
        total += double(weight[k]) * double(sums[k]);
        dot += double(weight[k]) * double(sums[a.channels + k]);
      }
      const Coefficients of(a, i);
      const double rstd = *of.rstd;
      *of.along = C(total * each);
      *of.slope = C(dot * each * rstd * rstd);
    });
  }

  // ---- planes

  // Of channel c of group i, whose values begin at `offset`.
  template <Activation ACT>
  static void plane_sums(const GroupNorm& a, int64_t i, int64_t c, int64_t offset, C* sums) {
    const Constants k(a, Coefficients(a, i), c);
    double total = 0, along = 0;
    for (int64_t start = 0; start < a.inner; start += kSumBlock) {
      const T *x = static_cast<const T*>(a.x) + offset + start, *dy = static_cast<const T*>(a.dy) + offset + start;
      Vec<C> t[4] = {}, p[4] = {};
      sweep<C>(smaller(kSumBlock, a.inner - start), [&](int64_t i, int slot, auto extent) {
        fetch_ahead(x + i);
        fetch_ahead(dy + i);
        const Vec<C> d = load(x + i, extent, k.mean) - k.mean;  // of a missing lane 0: 0 * inf would leave a NaN
        const Vec<C> dz = through<ACT, C>(load(dy + i, extent), d * k.scale + k.shift);
        t[slot] += dz;
        p[slot] += dz * d;
      });
      total += double(sum(add_up(t)));
      along += double(sum(add_up(p)));
    }
    sums[c] = C(total);
    sums[a.channels + c] = C(along);
  }

  template <Activation ACT>
  static void sums_of_planes(const GroupNorm& a, int64_t begin, int64_t end) {
    const int64_t width = a.group_channels();
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / a.channels;
      plane_sums<ACT>(a, plane / width, plane - n * a.channels, plane * a.inner, sums_of(a, n));
    }
  }

  template <Activation ACT>
  static void dx_piece(const GroupNorm& a, int64_t i, int64_t c, int64_t offset, int64_t size) {
    const Coefficients of(a, i);
    const Constants k(a, of, c);
    const Vec<C> along = splat(*of.along), slope = splat(*of.slope);
    const T *x = static_cast<const T*>(a.x) + offset, *dy = static_cast<const T*>(a.dy) + offset;
    T* dx = static_cast<T*>(a.dx) + offset;
    sweep<C>(size, [&](int64_t i, int, auto extent) {
      fetch_ahead(dx + i);
      const Vec<C> d = load(x + i, extent) - k.mean;
      const Vec<C> dz = through<ACT, C>(load(dy + i, extent), d * k.scale + k.shift);
      // In this order equal terms cancel exactly, as they must where a group has one or two values.
      store(dx + i, ((dz * k.weight - along) - d * slope) * k.rstd, extent);
    });
  }

  template <Activation ACT>
  static void planes(const GroupNorm& a, int64_t begin, int64_t end) {
    const int64_t width = a.group_channels();
    each_piece_of_planes(a.inner, kPlanePiece, begin, end, [&](int64_t plane, int64_t start, int64_t size) {
      dx_piece<ACT>(a, plane / width, plane % a.channels, plane * a.inner + start, size);
    });
  }

  // Sums, and dx if it is wanted, of groups [begin, end).
  template <Activation ACT>
  static void groups(const GroupNorm& a, int64_t begin, int64_t end) {
    if (a.inner == 1) return each_group(a, begin, end, [&](auto... group) { single_values<ACT>(a, group...); });
    each_group(a, begin, end, [&](int64_t i, int64_t n, int64_t first, int64_t width) {
      for (int64_t k = 0; k < width; ++k) {
        plane_sums<ACT>(a, i, first + k, (i * width + k) * a.inner, sums_of(a, n));
      }
    });
    if (a.dx == nullptr) return;
    slopes(a, begin, end);
    each_group(a, begin, end, [&](int64_t i, int64_t, int64_t first, int64_t width) {
      each_plane(width, 2 * width * a.inner * int64_t(sizeof(T)),
                 [&](int64_t k) { dx_piece<ACT>(a, i, first + k, (i * width + k) * a.inner, a.inner); });
    });
  }

  // Planes of one value each: group i is a row of channels.
  template <Activation ACT>
  static void single_values(const GroupNorm& a, int64_t i, int64_t n, int64_t first, int64_t width) {
    const Coefficients of(a, i);
    const C *weight = static_cast<const C*>(a.weight) + first, *bias = static_cast<const C*>(a.bias) + first;
    const Vec<C> mean = splat(*of.mean), rstd = splat(*of.rstd);
    const T *x = static_cast<const T*>(a.x) + i * width, *dy = static_cast<const T*>(a.dy) + i * width;
    C *totals = sums_of(a, n) + first, *alongs = totals + a.channels;
    sweep<C>(width, [&](int64_t k, int, auto extent) {
      const Vec<C> d = load(x + k, extent) - mean;
      const Vec<C> z = d * (rstd * load(weight + k, extent)) + load(bias + k, extent);
      const Vec<C> dz = through<ACT, C>(load(dy + k, extent), z);
      store(totals + k, dz, extent);
      store(alongs + k, dz * d, extent);
    });
    if (a.dx == nullptr) return;
    slopes(a, i, i + 1);
    const Vec<C> along = splat(*of.along), slope = splat(*of.slope);
    T* dx = static_cast<T*>(a.dx) + i * width;
    sweep<C>(width, [&](int64_t k, int, auto extent) {
      const Vec<C> d = load(x + k, extent) - mean, dz = load(totals + k, extent);
      store(dx + k, ((dz * load(weight + k, extent) - along) - d * slope) * rstd, extent);
    });
  }

  // ---- rows; the tables of a sample's columns begin with mean, scale and shift

  static void columns_of(const GroupNorm& a, int64_t n, bool slopes, C* columns) {
    const int64_t width = a.stats.cut.width;
    each_group(a, n * a.groups, (n + 1) * a.groups, [&](int64_t i, int64_t, int64_t first, int64_t channels) {
      const Coefficients of(a, i);
      for (int64_t c = first; c < first + channels; ++c) {
        const C weight = static_cast<const C*>(a.weight)[c];
        columns[c] = *of.mean;
        columns[width + c] = *of.rstd * weight;
        columns[2 * width + c] = static_cast<const C*>(a.bias)[c];
        if (!slopes) continue;
        columns[3 * width + c] = weight;
        columns[4 * width + c] = *of.along;
        columns[5 * width + c] = *of.slope;
        columns[6 * width + c] = *of.rstd;
      }
    });
    repeat_columns(columns, slopes ? kColumns : 3, width, a.channels);
  }

  template <Activation ACT, int R>
  static void add_rows(const T* x, const T* dy, const C* columns, int64_t width, int64_t size, C* total, C* along) {
    sweep<C>(size, [&](int64_t i, int, auto extent) {
      const Vec<C> mean = load(columns + i, extent), scale = load(columns + width + i, extent);
      const Vec<C> shift = load(columns + 2 * width + i, extent);
      Vec<C> t = {}, p = {};
      for (int r = 0; r < R; ++r) {
        const Vec<C> d = load(x + r * width + i, extent) - mean;
        const Vec<C> dz = through<ACT, C>(load(dy + r * width + i, extent), d * scale + shift);
        t += dz;
        p += dz * d;
      }
      store(total + i, load(total + i, extent) + t, extent);
      store(along + i, load(along + i, extent) + p, extent);
    });
  }

  // Sums of chunks first ... last - 1 of sample n into the partial sums.
  template <Activation ACT>
  static void row_sums(const GroupNorm& a, C* columns, int64_t n, int64_t first, int64_t last) {
    const Cut& cut = a.stats.cut;
    const int64_t width = cut.width;
    columns_of(a, n, false, columns);
    C *total = columns + kColumns * width, *along = total + width;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const bool rest = chunk == cut.chunks;  // what is left of the last wide row
      const int64_t size = rest ? cut.rest : width;
      int64_t row = rest ? cut.full : chunk * cut.chunk_rows;
      const int64_t stop = rest ? row + 1 : smaller(row + cut.chunk_rows, cut.full);
      const int64_t offset = n * a.inner * a.channels;
      const T *x = static_cast<const T*>(a.x) + offset, *dy = static_cast<const T*>(a.dy) + offset;
      for (int64_t i = 0; i < size; ++i) total[i] = along[i] = 0;
      for (; row + 8 <= stop; row += 8) {
        add_rows<ACT, 8>(x + row * width, dy + row * width, columns, width, size, total, along);
      }
      for (; row < stop; ++row) {
        add_rows<ACT, 1>(x + row * width, dy + row * width, columns, width, size, total, along);
      }
      double* out = a.stats.partial + (n * a.chunks() + chunk) * 2 * width;
      for (int64_t i = 0; i < size; ++i) {
        out[i] = total[i];
        out[width + i] = along[i];
      }
    }
  }

  // The chunks of sample n added up.
  static void merge_sample(const GroupNorm& a, int64_t n) {
    const int64_t width = a.stats.cut.width;
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t start = 0; start < a.channels; start += kBlock) {
        const int64_t size = smaller(kBlock, a.channels - start);
        double totals[kBlock] = {};
        for (int64_t chunk = 0; chunk < a.chunks(); ++chunk) {
          const double* partial = a.stats.partial + ((n * a.chunks() + chunk) * 2 + half) * width;
          // of a shorter wide row nothing else has been written
          const int64_t end = chunk == a.stats.cut.chunks ? a.stats.cut.rest : width;
          for (int64_t copy = 0; copy < end; copy += a.channels) {
            for (int64_t i = 0; i < size; ++i) totals[i] += partial[copy + start + i];
          }
        }
        C* sums = sums_of(a, n) + half * a.channels + start;
        for (int64_t i = 0; i < size; ++i) sums[i] = C(totals[i]);
      }
    }
  }

  template <Activation ACT, int... R>
  static void dx_rows(const T* x, const T* dy, T* dx, const C* columns, int64_t width, int64_t size, Indices<R...>) {
    sweep<C>(size, [&](int64_t i, int, auto extent) {
      const auto column = [&](int64_t t) { return load(columns + t * width + i, extent); };
      const Vec<C> mean = column(0), weight = column(3), along = column(4), slope = column(5), rstd = column(6);
      const Vec<C> scale = ACT == kNone ? mean : column(1), shift = ACT == kNone ? mean : column(2);
      for (int r = 0; r < int(sizeof...(R)); ++r) {
        const Vec<C> d = load(x + r * width + i, extent) - mean;
        const Vec<C> dz = through<ACT, C>(load(dy + r * width + i, extent), d * scale + shift);
        store(dx + r * width + i, ((dz * weight - along) - d * slope) * rstd, extent);
      }
    });
  }

  template <Activation ACT>
  static void rows(const GroupNorm& a, C* columns, int64_t n, int64_t first, int64_t last) {
    const int64_t width = a.stats.cut.width, offset = n * a.inner * a.channels;
    columns_of(a, n, true, columns);
    each_rows_back(a.stats.cut, first, last, [&](int64_t row, auto rows, int64_t size) {
      const int64_t at = offset + row * width;
      dx_rows<ACT>(static_cast<const T*>(a.x) + at, static_cast<const T*>(a.dy) + at, static_cast<T*>(a.dx) + at,
                   columns, width, size, rows);
    });
  }
};

template <class T>
void sample_sums(const GroupNorm& a, void* buffer, int64_t n, int64_t first, int64_t last) {
  PYDL_WITH_ACTIVATION(Backward<T>::template row_sums, a, static_cast<compute_t<T>*>(buffer), n, first, last);
}
template <class T>
void sample_dx(const GroupNorm& a, void* buffer, int64_t n, int64_t first, int64_t last) {
  PYDL_WITH_ACTIVATION(Backward<T>::template rows, a, static_cast<compute_t<T>*>(buffer), n, first, last);
}

}  // namespace

// The table of groups [begin, end): their means, and rstd from their variances.
void group_norm_bwd_table(const GroupNorm& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, {
    auto* table = static_cast<compute_t<T>*>(a.table);
    const auto *mean = static_cast<const compute_t<T>*>(a.mean), *var = static_cast<const compute_t<T>*>(a.var);
    for (int64_t i = begin; i < end; ++i) {
      table[i] = mean[i];
      table[a.all_groups() + i] = compute_t<T>(1 / __builtin_sqrt(double(var[i]) + a.eps));
    }
  });
}

// Sums of planes [begin, end), or of the chunks of all samples; the buffer holds kColumns + 2 wide rows.
void group_norm_bwd_sums(const GroupNorm& a, void* buffer, int64_t begin, int64_t end) {
  if (a.rows) {
    each_sample(a.chunks(), begin, end, [&](int64_t n, int64_t first, int64_t last) {
      PYDL_FLOAT_SWITCH(a.dtype, sample_sums<T>(a, buffer, n, first, last));
    });
    return;
  }
  PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_ACTIVATION(Backward<T>::template sums_of_planes, a, begin, end));
}

// The sums of samples [begin, end) of rows from those of their chunks.
void group_norm_bwd_merge(const GroupNorm& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) PYDL_FLOAT_SWITCH(a.dtype, Backward<T>::merge_sample(a, n));
}

// along and slope of groups [begin, end).
void group_norm_bwd_slopes(const GroupNorm& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, Backward<T>::slopes(a, begin, end));
}

// dx of pieces [begin, end) of all planes, or of wide rows of all samples.
void group_norm_bwd_dx(const GroupNorm& a, void* buffer, int64_t begin, int64_t end) {
  if (!a.rows) {
    PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_ACTIVATION(Backward<T>::template planes, a, begin, end));
    return;
  }
  each_sample(a.sample_rows(), begin, end, [&](int64_t n, int64_t first, int64_t last) {
    PYDL_FLOAT_SWITCH(a.dtype, sample_dx<T>(a, buffer, n, first, last));
  });
}

// Everything but the parameters' gradients of groups [begin, end), or of samples.
void group_norm_bwd_units(const GroupNorm& a, void* buffer, int64_t begin, int64_t end) {
  if (a.rows) {
    for (int64_t i = begin; i < end; ++i) {
      group_norm_bwd_table(a, i * a.groups, (i + 1) * a.groups);
      PYDL_FLOAT_SWITCH(a.dtype, sample_sums<T>(a, buffer, i, 0, a.chunks()));
      group_norm_bwd_merge(a, i, i + 1);
      if (a.dx == nullptr) continue;
      group_norm_bwd_slopes(a, i * a.groups, (i + 1) * a.groups);
      PYDL_FLOAT_SWITCH(a.dtype, sample_dx<T>(a, buffer, i, 0, a.sample_rows()));
    }
    return;
  }
  const int64_t batch = a.groups_at_once();
  for (int64_t i = begin; i < end; i += batch) {
    const int64_t last = smaller(end, i + batch);
    group_norm_bwd_table(a, i, last);
    PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_ACTIVATION(Backward<T>::template groups, a, i, last));
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, group_norm_bwd_table, const GroupNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_bwd_sums, const GroupNorm&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_bwd_merge, const GroupNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_bwd_slopes, const GroupNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_bwd_dx, const GroupNorm&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_bwd_units, const GroupNorm&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_bwd_parameters, const GroupNorm&, int64_t, int64_t)

namespace {

void run_backward(GroupNorm& a) {
  const int64_t item = size_of(compute_dtype(a.dtype)), size = a.samples * a.channels * a.inner;
  const int64_t units = a.rows ? a.samples : a.all_groups();
  const int64_t partial = a.rows ? a.samples * a.chunks() * 2 * a.stats.cut.width : 0;
  const int64_t table = 4 * a.all_groups() * item, sums = 2 * a.samples * a.channels * item;
  const Scratch scratch(partial * 8 + table + sums);
  a.stats.partial = scratch.get<double>();
  a.table = a.stats.partial + partial;
  a.sums = static_cast<char*>(a.table) + table;
  const auto run = [&](int64_t count, auto kernel) {
    parallel(count, 2 * (size / count), [&](int64_t begin, int64_t end) {
      const Scratch buffer(a.rows ? (kColumns + 2) * a.stats.cut.width * item : 0);
      kernel(a, buffer.get(), begin, end);
    });
  };
  if (by_unit(units) || a.inner == 1) {
    run(units, PYDL_CPU_DISPATCH(group_norm_bwd_units));
  } else {
    PYDL_CPU_DISPATCH(group_norm_bwd_table)(a, 0, a.all_groups());
    run(a.rows ? units * a.chunks() : a.samples * a.channels, PYDL_CPU_DISPATCH(group_norm_bwd_sums));
    if (a.rows) PYDL_CPU_DISPATCH(group_norm_bwd_merge)(a, 0, units);
    if (a.dx != nullptr) {
      PYDL_CPU_DISPATCH(group_norm_bwd_slopes)(a, 0, a.all_groups());
      run(a.rows ? a.samples * a.sample_rows() : a.samples * a.channels * ceil_of(a.inner, kPlanePiece),
          PYDL_CPU_DISPATCH(group_norm_bwd_dx));
    }
  }
  if (a.dweight == nullptr && a.dbias == nullptr) return;
  parallel(a.channels, 2 * a.samples,
           [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(group_norm_bwd_parameters)(a, begin, end); });
}

// A statistic of all groups in the compute type, as contiguous memory.
struct Statistic {
  Statistic(const char* op, const char* name, const Tensor& t, const GroupNorm& a)
      : given(op, name, t, a.all_groups()) {
    const Dtype compute = compute_dtype(a.dtype);
    STD_TORCH_CHECK(given.value.dtype == compute, op, ": ", name, " must be ", name_of(compute), ", got ",
                    name_of(given.value.dtype));
  }
  Operand given;
};

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& dy_in, const Tensor& x_in, const Tensor& mean,
                                                  const Tensor& var, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, int64_t groups, int64_t activation,
                                                  double eps, const std::vector<bool>& output_mask) {
  const char* const op = "group_norm_bwd";
  const Array meta(x_in);
  const Layout layout(op, meta);
  GroupNorm a = describe_groups(op, meta, layout, groups, activation, eps);
  STD_TORCH_CHECK(output_mask.size() == 3, op, ": output_mask must have 3 entries, got ", output_mask.size());
  const Dtype compute = compute_dtype(a.dtype);
  const ChannelParameter w(op, "weight", weight, a.channels, 1.0, compute);
  const ChannelParameter b(op, "bias", bias, a.channels, 0.0, compute);
  const Statistic mu(op, "mean", mean, a), sigma(op, "var", var, a);
  const Dense x = layout.dense_in(op, "x", x_in, meta, a.dtype), dy = layout.dense_in(op, "dy", dy_in, a.dtype);
  Output dx = output_mask[0] ? empty_like(layout, a.dtype) : empty_vector(0, a.dtype);
  Output dweight = empty_vector(output_mask[1] ? a.channels : 0, compute);
  Output dbias = empty_vector(output_mask[2] ? a.channels : 0, compute);
  a.x = x.data;
  a.dy = dy.data;
  a.mean = mu.given.value.data;
  a.var = sigma.given.value.data;
  a.weight = w.data();
  a.bias = b.data();
  a.dx = output_mask[0] ? dx.data : nullptr;
  a.dweight = output_mask[1] ? dweight.data : nullptr;
  a.dbias = output_mask[2] ? dbias.data : nullptr;
  if (a.samples * a.channels * a.inner > 0) {
    if (output_mask[0] || output_mask[1] || output_mask[2]) run_backward(a);
  } else {
    for (void* out : {a.dweight, a.dbias}) {
      if (out != nullptr && a.channels > 0) std::memset(out, 0, size_t(a.channels * size_of(compute)));
    }
  }
  return {std::move(dx.tensor), std::move(dweight.tensor), std::move(dbias.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("group_norm_bwd", TORCH_BOX(&group_norm_bwd)); }

}  // namespace
}  // namespace pydl

#endif
