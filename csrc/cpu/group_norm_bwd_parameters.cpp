// Group normalisation, backward: the gradients of the parameters, from the sums of each channel of each sample.

#include "cpu/group_norm_kernels.h"

namespace pydl::PYDL_ISA {
namespace {

// Channels begin ... end - 1 of half 0 (dz) or 1 (dz * xhat), over the samples.
template <class C>
void parameter(const GroupNorm& a, int64_t half, void* out, int64_t begin, int64_t end) {
  const int64_t width = a.group_channels();
  for (int64_t start = begin; start < end; start += kBlock) {
    double totals[kBlock] = {};
    const int64_t stop = smaller(end, start + kBlock);
    for (int64_t n = 0; n < a.samples; ++n) {
      const C* sums = group_sums<C>(a, n) + half * a.channels;
      const C* rstd = GroupCoefficients<C>(a, n * a.groups).rstd;
      for (int64_t c = start, g = start / width; c < stop; ++g) {
        const int64_t last = smaller(stop, (g + 1) * width);
        const double factor = half == 1 ? double(rstd[g]) : 1.0;
        for (; c < last; ++c) totals[c - start] += double(sums[c]) * factor;
      }
    }
    for (int64_t c = start; c < stop; ++c) static_cast<C*>(out)[c] = C(totals[c - start]);
  }
}

}  // namespace

// dweight and dbias of channels [begin, end).
void group_norm_bwd_parameters(const GroupNorm& a, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(a.dtype, {
    if (a.dbias != nullptr) parameter<compute_t<T>>(a, 0, a.dbias, begin, end);
    if (a.dweight != nullptr) parameter<compute_t<T>>(a, 1, a.dweight, begin, end);
  });
}

}  // namespace pydl::PYDL_ISA
