// The two directions of a mean over windows: the forward writes outputs and reads inputs, the backward, its transpose,
// the other way round.
#pragma once

#include "common/pool.h"
#include "common/vec.h"

namespace pydl::PYDL_ISA {
namespace {

template <bool FORWARD>
inline int64_t written(const PoolDim& d) {
  return FORWARD ? d.out : d.in;
}
template <bool FORWARD>
inline int64_t read(const PoolDim& d) {
  return FORWARD ? d.in : d.out;
}
// What the written position depends on.
template <bool FORWARD>
inline Span<int64_t> sources(const PoolDim& d, int64_t at) {
  return FORWARD ? inputs_of(d, at) : outputs_of(d, at);
}
// The divisor of output (od, oh, ow) is a product of three shares.
template <class C>
inline C depth_share(const PoolMean& a, int64_t od) {
  return C(a.divisor != 0 ? a.divisor : counted(a.shape.d, od, a.include_padding));
}
template <class C>
inline C share(const PoolMean& a, const PoolDim& d, int64_t o) {
  return C(a.divisor != 0 ? 1 : counted(d, o, a.include_padding));
}

}  // namespace
}  // namespace pydl::PYDL_ISA
