// Forms of a box and the linear maps between them, once for both languages. Each axis has two numbers, which are its
// ends, its start and length, or its centre and length. The transposed maps carry gradients.
#pragma once

#include "common/box_pair.h"

namespace pydl {

enum BoxForm : int64_t {
  kEndsToStart,
  kStartToEnds,
  kEndsToCentre,
  kCentreToEnds,
  kStartToCentre,
  kCentreToStart,
  kBoxForms
};

}  // namespace pydl

namespace PYDL_BOX_NAMESPACE {
namespace {

template <class V>
struct BoxPairOf {
  V p, q;
};

// FORM, or the transpose of FORM - kBoxForms. C is the type of a number in V.
template <int64_t FORM, class C, class V>
PYDL_BOX_FN BoxPairOf<V> convert_axis(V p, V q) {
  constexpr int64_t T = kBoxForms;
  const C half = C(0.5);
  if constexpr (FORM == kEndsToStart) return {p, q - p};
  if constexpr (FORM == kStartToEnds) return {p, p + q};
  if constexpr (FORM == kEndsToCentre) return {(p + q) * half, q - p};
  if constexpr (FORM == kCentreToEnds) return {p - q * half, p + q * half};
  if constexpr (FORM == kStartToCentre) return {p + q * half, q};
  if constexpr (FORM == kCentreToStart) return {p - q * half, q};
  if constexpr (FORM == T + kEndsToStart) return {p - q, q};
  if constexpr (FORM == T + kStartToEnds) return {p + q, q};
  if constexpr (FORM == T + kEndsToCentre) return {p * half - q, p * half + q};
  if constexpr (FORM == T + kCentreToEnds) return {p + q, (q - p) * half};
  if constexpr (FORM == T + kStartToCentre) return {p, q + p * half};
  if constexpr (FORM == T + kCentreToStart) return {p, q - p * half};
}

}  // namespace
}  // namespace PYDL_BOX_NAMESPACE

#if PYDL_ISA_LEVEL == 0

#include "common/host.h"

namespace pydl {
namespace {

inline int64_t checked_form(int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form < 2 * kBoxForms, "box_form: form must be below ", 2 * int64_t(kBoxForms), ", got ",
                  form);
  return form;
}

}  // namespace
}  // namespace pydl

#endif
