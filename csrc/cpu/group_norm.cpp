// Group normalisation, forward (Wu and He, "Group normalization", 2018), with an optional activation behind it:
// y = act((x - mean) * rstd * weight + bias), mean and rstd of each group of channels of each sample. Instance
// normalisation is the same with one channel per group.

#include "cpu/group_norm_kernels.h"

namespace pydl {
namespace PYDL_ISA {
namespace {

// ---- statistics

struct GroupMoments {
  double mean, var;
};

// Statistics of a sample's channels, chunk by chunk, as one set for channels [begin, end).
GroupMoments merge_channels(const BatchNorm& s, int64_t begin, int64_t end, double count) {
  const Cut& cut = s.cut;
  const int64_t channels = s.shape.channels;
  // f(count, mean, squares) of every column of the channels
  const auto each = [&](auto&& f) {
    for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
      const double rows = double(smaller(cut.chunk_rows, cut.full - chunk * cut.chunk_rows));
      const double* partial = s.partial + chunk * 2 * cut.width;
      for (int64_t copy = 0; copy < cut.width; copy += channels) {
        for (int64_t i = copy + begin; i < copy + end; ++i) f(rows, partial[i], partial[cut.width + i]);
      }
    }
    const double* partial = s.partial + cut.chunks * 2 * cut.width;
    for (int64_t copy = 0; copy < cut.rest; copy += channels) {
      for (int64_t i = copy + begin; i < copy + end; ++i) f(1.0, partial[i], 0.0);
    }
  };
  double total = 0, squares = 0;
  each([&](double n, double mean, double) { total += n * mean; });
  const double mean = total / count;
  each([&](double n, double m, double q) { squares += q + n * (m - mean) * (m - mean); });
  return {mean, squares / count};
}

// Statistics of group i of planes from its chunks, of one piece each.
GroupMoments merge_pieces(const GroupNorm& a, int64_t i) {
  const Cut& cut = a.stats.cut;
  const double* partial = a.stats.partial + 2 * i * cut.chunks;
  const int64_t size = a.stats.shape.inner;
  const double each = 1 / double(size);
  double mean = partial[0], squares = partial[1];
  if (cut.chunks == 1) return {mean, squares * each};
  const auto count = [&](int64_t k) { return double(smaller(cut.piece, size - k * cut.piece)); };
  mean = squares = 0;
  for (int64_t k = 0; k < cut.chunks; ++k) mean += count(k) * partial[2 * k];
  mean *= each;
  for (int64_t k = 0; k < cut.chunks; ++k) {
    const double d = partial[2 * k] - mean;
    squares += partial[2 * k + 1] + count(k) * d * d;
  }
  return {mean, squares * each};
}

template <class C>
void write_group(const GroupNorm& a, int64_t i, const GroupMoments& m) {
  const double rstd = 1 / __builtin_sqrt(m.var + a.eps), rest = m.mean - double(C(m.mean));
  C* table = static_cast<C*>(a.table);
  const int64_t all = a.all_groups();
  static_cast<C*>(a.stats.out_mean)[i] = table[i] = C(m.mean);
  static_cast<C*>(a.stats.out_var)[i] = C(m.var);
  table[all + i] = C(rstd);
  table[2 * all + i] = C(is_finite(rest) ? -rest * rstd : 0.0);
}

// Of sample n; the others' are elsewhere.
BatchNorm sample_stats(const GroupNorm& a, int64_t n) {
  BatchNorm s = a.stats;
  PYDL_FLOAT_SWITCH(a.dtype, s.x = static_cast<const T*>(a.x) + n * a.inner * a.channels);
  s.partial += n * a.chunks() * 2 * a.stats.cut.width;
  return s;
}

// ---- values

template <class T>
struct Apply {
  using C = compute_t<T>;

  // Part of channel c of group i of all, beginning at `offset`.
  template <Activation ACT>
  static void piece(const GroupNorm& a, int64_t i, int64_t c, int64_t offset, int64_t size) {
    const int64_t all = a.all_groups();
    const C* table = static_cast<const C*>(a.table) + i;
    const C weight = static_cast<const C*>(a.weight)[c], bias = static_cast<const C*>(a.bias)[c];
    const Vec<C> mean = splat(table[0]), scale = splat(table[all] * weight);
    const Vec<C> shift = splat(table[2 * all] * weight + bias);
    const T* x = static_cast<const T*>(a.x) + offset;
    T* y = static_cast<T*>(a.y) + offset;
    sweep<C>(size, [&](int64_t i, int, auto extent) {
      fetch_ahead(y + i);
      store(y + i, activate<ACT, C>((load(x + i, extent) - mean) * scale + shift), extent);
    });
  }

  template <Activation ACT>
  static void groups(const GroupNorm& a, int64_t begin, int64_t end) {
    if (a.inner == 1) return each_group(a, begin, end, [&](auto... group) { row<ACT>(a, group...); });
    each_group(a, begin, end, [&](int64_t i, int64_t, int64_t first, int64_t width) {
      each_plane(width, width * a.inner * int64_t(sizeof(T)),
                 [&](int64_t k) { piece<ACT>(a, i, first + k, (i * width + k) * a.inner, a.inner); });
    });
  }

  // Group i of all, whose channels have one value each.
  template <Activation ACT>
  static void row(const GroupNorm& a, int64_t i, int64_t, int64_t first, int64_t width) {
    const C* table = static_cast<const C*>(a.table) + i;
    const C *weight = static_cast<const C*>(a.weight) + first, *bias = static_cast<const C*>(a.bias) + first;
    const Vec<C> mean = splat(table[0]), rstd = splat(table[a.all_groups()]), rest = splat(table[2 * a.all_groups()]);
    const T* x = static_cast<const T*>(a.x) + i * width;
    T* y = static_cast<T*>(a.y) + i * width;
    sweep<C>(width, [&](int64_t k, int, auto extent) {
      const Vec<C> xhat = (load(x + k, extent) - mean) * rstd + rest;
      store(y + k, activate<ACT, C>(xhat * load(weight + k, extent) + load(bias + k, extent)), extent);
    });
  }

  template <Activation ACT>
  static void planes(const GroupNorm& a, int64_t begin, int64_t end) {
    const int64_t width = a.group_channels();
    each_piece_of_planes(a.inner, kPlanePiece, begin, end, [&](int64_t plane, int64_t start, int64_t size) {
      piece<ACT>(a, plane / width, plane % a.channels, plane * a.inner + start, size);
    });
  }

  // Rows first ... last - 1 of sample n; the buffer holds a table of its columns: mean, scale, shift.
  template <Activation ACT>
  static void rows(const GroupNorm& a, C* columns, int64_t n, int64_t first, int64_t last) {
    const Cut& cut = a.stats.cut;
    const int64_t all = a.all_groups(), width = cut.width, channels = a.channels;
    for (int64_t c = 0, g = 0; g < a.groups; ++g) {
      const C* table = static_cast<const C*>(a.table) + n * a.groups + g;
      for (int64_t stop = c + a.group_channels(); c < stop; ++c) {
        const C weight = static_cast<const C*>(a.weight)[c], bias = static_cast<const C*>(a.bias)[c];
        columns[c] = table[0];
        columns[width + c] = table[all] * weight;
        columns[2 * width + c] = table[2 * all] * weight + bias;
      }
    }
    repeat_columns(columns, 3, width, channels);
    const int64_t offset = n * a.inner * channels;
    each_rows_back(cut, first, last, [&](int64_t row, auto rows, int64_t size) {
      apply_rows<ACT>(static_cast<const T*>(a.x) + offset + row * width, static_cast<T*>(a.y) + offset + row * width,
                      columns, width, size, rows);
    });
  }

  template <Activation ACT, int... R>
  static void apply_rows(const T* x, T* y, const C* columns, int64_t width, int64_t size, Indices<R...>) {
    sweep<C>(size, [&](int64_t i, int, auto extent) {
      const Vec<C> mean = load(columns + i, extent), scale = load(columns + width + i, extent);
      const Vec<C> shift = load(columns + 2 * width + i, extent);
      for (int r = 0; r < int(sizeof...(R)); ++r) {
        fetch_back(x + r * width + i);
        fetch_back(y + r * width + i);
        const Vec<C> z = (load(x + r * width + i, extent) - mean) * scale + shift;
        store(y + r * width + i, activate<ACT, C>(z), extent);
      }
    });
  }
};

template <class T>
void apply_sample(const GroupNorm& a, void* buffer, int64_t n, int64_t first, int64_t last) {
  PYDL_WITH_ACTIVATION(Apply<T>::template rows, a, static_cast<compute_t<T>*>(buffer), n, first, last);
}

}  // namespace

// out[i] = parameter[i], or `absent`, in the compute type.
void group_norm_widen(const Parameter& parameter, double absent, Dtype compute, void* out, int64_t n) {
  double values[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = smaller(kBlock, n - start);
    widen_parameter(parameter, absent, values, start, size);
    PYDL_FLOAT_SWITCH(
        compute, for (int64_t i = 0; i < size;
                      ++i) { from_compute(compute_t<T>(values[i]), static_cast<T*>(out) + start + i); });
  }
}

// Statistics of chunks [begin, end) of all groups, or of all samples; the buffer holds three wide rows.
void group_norm_stats(const GroupNorm& a, void* buffer, int64_t begin, int64_t end) {
  if (!a.rows) {
    if (a.stats.shape.inner > 1) batch_norm_plane_stats(a.stats, begin, end);
    return;
  }
  each_sample(a.chunks(), begin, end, [&](int64_t n, int64_t first, int64_t last) {
    batch_norm_row_stats(sample_stats(a, n), buffer, first, last);
  });
}

void group_norm_merge(const GroupNorm& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (a.rows) {
      const BatchNorm s = sample_stats(a, i);
      for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t width = a.group_channels();
        const GroupMoments m = merge_channels(s, g * width, (g + 1) * width, double(a.group_size()));
        PYDL_FLOAT_SWITCH(a.dtype, write_group<compute_t<T>>(a, i * a.groups + g, m));
      }
    } else if (a.stats.shape.inner > 1) {
      PYDL_FLOAT_SWITCH(a.dtype, write_group<compute_t<T>>(a, i, merge_pieces(a, i)));
    } else {  // a single value is its own mean
      PYDL_FLOAT_SWITCH(a.dtype, {
        const double value = double(to_compute(static_cast<const T*>(a.x)[i]));
        write_group<compute_t<T>>(a, i, {value, value - value});
      });
    }
  }
}

// Values of pieces [begin, end) of all planes, or of wide rows of all samples.
void group_norm_apply(const GroupNorm& a, void* buffer, int64_t begin, int64_t end) {
  if (!a.rows) {
    PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_ACTIVATION(Apply<T>::template planes, a, begin, end));
    return;
  }
  each_sample(a.sample_rows(), begin, end, [&](int64_t n, int64_t first, int64_t last) {
    PYDL_FLOAT_SWITCH(a.dtype, apply_sample<T>(a, buffer, n, first, last));
  });
}

// Everything of groups [begin, end), or of samples.
void group_norm_units(const GroupNorm& a, void* buffer, int64_t begin, int64_t end) {
  const int64_t batch = a.rows ? 1 : a.groups_at_once();
  for (int64_t i = begin; i < end; i += batch) {
    const int64_t last = smaller(end, i + batch);
    group_norm_stats(a, buffer, i * a.chunks(), last * a.chunks());
    group_norm_merge(a, i, last);
    if (a.rows) {
      PYDL_FLOAT_SWITCH(a.dtype, apply_sample<T>(a, buffer, i, 0, a.sample_rows()));
    } else {
      PYDL_FLOAT_SWITCH(a.dtype, PYDL_WITH_ACTIVATION(Apply<T>::template groups, a, i, last));
    }
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, group_norm_stats, const GroupNorm&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_merge, const GroupNorm&, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_apply, const GroupNorm&, void*, int64_t, int64_t)
PYDL_CPU_DECLARE(void, group_norm_units, const GroupNorm&, void*, int64_t, int64_t)

namespace {

void run_forward(GroupNorm& a) {
  const int64_t item = size_of(compute_dtype(a.dtype)), size = a.samples * a.channels * a.inner;
  const int64_t units = a.rows ? a.samples : a.all_groups(), buffer_bytes = a.rows ? 3 * a.stats.cut.width * item : 0;
  const int64_t partial = units * a.chunks() * 2 * (a.rows ? a.stats.cut.width : 1);
  const Scratch scratch(partial * 8 + 3 * a.all_groups() * item);
  a.stats.partial = scratch.get<double>();
  a.table = a.stats.partial + partial;
  a.stats.x = a.x;
  const auto run = [&](int64_t count, auto kernel) {
    parallel(count, size / count, [&](int64_t begin, int64_t end) {
      const Scratch buffer(buffer_bytes);
      kernel(a, buffer.get(), begin, end);
    });
  };
  if (by_unit(units) || a.inner == 1) return run(units, PYDL_CPU_DISPATCH(group_norm_units));
  run(units * a.chunks(), PYDL_CPU_DISPATCH(group_norm_stats));
  parallel(units, a.chunks() * 2 * (a.rows ? a.stats.cut.width : 1),
           [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(group_norm_merge)(a, begin, end); });
  run(a.rows ? a.samples * a.sample_rows() : a.samples * a.channels * ceil_of(a.inner, kPlanePiece),
      PYDL_CPU_DISPATCH(group_norm_apply));
}

std::tuple<Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, int64_t activation, double eps) {
  const char* const op = "group_norm_fwd";
  const Array meta(x);
  const Layout layout(op, meta);
  GroupNorm a = describe_groups(op, meta, layout, groups, activation, eps);
  const Dtype compute = compute_dtype(a.dtype);
  const ChannelParameter w(op, "weight", weight, a.channels, 1.0, compute);
  const ChannelParameter b(op, "bias", bias, a.channels, 0.0, compute);
  const int64_t shape[2] = {a.samples, groups};
  Output y = empty_like(layout, a.dtype), mean = empty(shape, 2, compute), var = empty(shape, 2, compute);
  const Dense dense = layout.dense_in(op, "x", x, meta, a.dtype);
  a.x = dense.data;
  a.y = y.data;
  a.weight = w.data();
  a.bias = b.data();
  a.stats.out_mean = mean.data;
  a.stats.out_var = var.data;
  if (a.samples * a.channels * a.inner > 0) {
    run_forward(a);
  } else if (a.all_groups() > 0) {  // groups without a value
    std::memset(mean.data, 0, size_t(a.all_groups() * size_of(compute)));
    std::memset(var.data, 0, size_t(a.all_groups() * size_of(compute)));
  }
  return {std::move(y.tensor), std::move(mean.tensor), std::move(var.tensor)};
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("group_norm_fwd", TORCH_BOX(&group_norm_fwd)); }

}  // namespace
}  // namespace pydl

#endif
