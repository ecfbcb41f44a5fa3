// What the files of group normalisation share. The first part is plain data and is compiled at every ISA level.
//
// n values of 4 bytes: the forward reads x and writes y, 8 n bytes and about 7 n operations; the backward reads dy and
// x and writes dx, 12 n bytes and about 12 n operations. Both read their inputs twice, which costs memory's time again
// only where a group (contiguous) or a sample (channels last) does not stay in a core's cache.
//
// Contiguous, a group of a sample is one run of memory: its statistics are those of a channel of batch normalisation
// whose channels are all groups of all samples. Channels last, a sample is rows of channels: each channel's statistics
// are those of batch normalisation and are merged over the group. Sums are cut by the shape alone.
#pragma once

#include "cpu/batch_norm.h"

namespace pydl {

struct GroupNorm {
  int64_t samples, groups, channels, inner;
  bool rows;        // channels last, with more than one channel and position
  int activation;   // 0 none, 1 relu, 2 silu
  BatchNorm stats;  // all groups as channels; rows: one sample, whose x and partial are set for each
  const void *x, *dy;
  void *y, *dx;               // null if not wanted
  const void *weight, *bias;  // of the compute type, one for each channel
  const void *mean, *var;     // given statistics of each group (backward), of the compute type
  void* table;                // of each group mean and rstd; forward what rounding took from the mean, times -rstd;
                              // backward along and slope
  void* sums;                 // backward, of each sample and channel: the sums of dz, then those of dz * (x - mean)
  void *dweight, *dbias;      // null if not wanted
  double eps;
  Dtype dtype;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_size() const { return group_channels() * inner; }
  int64_t all_groups() const { return samples * groups; }
  // Planes: small groups of which a thread takes several at once. Their values stay in its first cache, and the last
  // steps of their statistics, a chain of divisions and a root, overlap.
  int64_t groups_at_once() const { return group_size() < 2048 ? 4096 / group_size() : 1; }
  // rows: wide rows of a sample, and the chunks that they are summed in
  int64_t sample_rows() const { return stats.cut.full + (stats.cut.rest > 0); }
  int64_t chunks() const { return stats.cut.chunks + (rows && stats.cut.rest > 0); }
};

// Elements of a plane that are dealt out at once where groups are few.
inline constexpr int64_t kPlanePiece = 16384;
// Rows of the table of one sample's columns that kernels for channels last build.
inline constexpr int64_t kColumns = 7;

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, group_norm_widen, const Parameter&, double, Dtype, void*, int64_t)

namespace {

// Whether a thread takes whole groups or samples, whose values are then in its cache for the second pass: if that keeps
// the threads busy for four fifths of the time.
inline bool by_unit(int64_t units) {
  const int64_t threads = torch::stable::get_num_threads();
  return 5 * units >= 4 * threads * ceil_of(units, threads);
}

// A parameter of every channel in the compute type, `absent` if it is not there.
struct ChannelParameter {
  ChannelParameter(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels, double absent,
                   Dtype compute)
      : given(op, name, t, channels),
        as_given(given.value.data != nullptr && given.value.dtype == compute),
        widened(as_given ? 0 : channels * size_of(compute)) {
    if (!as_given) PYDL_CPU_DISPATCH(group_norm_widen)(given.value, absent, compute, widened.get(), channels);
  }
  const void* data() const { return as_given ? given.value.data : widened.get(); }

  Operand given;
  bool as_given;
  Scratch widened;
};

inline GroupNorm describe_groups(const char* op, const Array& x, const Layout& layout, int64_t groups,
                                 int64_t activation, double eps) {
  STD_TORCH_CHECK(is_floating(x.dtype), op, ": x must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(groups > 0 && x.sizes[1] % groups == 0, op, ": groups must divide the ", x.sizes[1],
                  " channels of x, got ", groups);
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, op, ": activation must be 0, 1 or 2, got ", activation);
  GroupNorm a{};
  a.samples = x.sizes[0];
  a.groups = groups;
  a.channels = x.sizes[1];
  a.inner = 1;
  for (int64_t d = 2; d < x.dim; ++d) a.inner *= x.sizes[d];
  a.rows = layout.last && a.channels > 1 && a.inner > 1;
  a.activation = int(activation);
  a.eps = eps;
  a.dtype = x.dtype;
  a.stats.shape = a.rows ? Channels{a.inner, a.channels, 1} : Channels{1, a.all_groups(), a.group_size()};
  a.stats.eps = eps;
  a.stats.dtype = x.dtype;
  if (x.numel() > 0) a.stats.cut = cut_of(a.stats.shape);
  return a;
}

}  // namespace
}  // namespace pydl

#endif
