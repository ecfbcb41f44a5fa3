// Element types of CPU kernels. Plain data only: this header is compiled at every ISA level.
#pragma once

#include <stdint.h>

namespace pydl {

enum class Dtype : int { kFloat, kDouble, kHalf, kBFloat16, kUInt8, kInt64, kInt32, kBool, kOther };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type an element is computed and accumulated in.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

template <class A, class B>
inline constexpr bool is_same = false;
template <class A>
inline constexpr bool is_same<A, A> = true;

}  // namespace pydl

// Runs the statement with T bound to the element type of a floating dtype; nothing for the others.
#define PYDL_FLOAT_SWITCH(dtype, ...) \
  switch (dtype) {                    \
    case ::pydl::Dtype::kFloat: {     \
      using T = float;                \
      __VA_ARGS__;                    \
    } break;                          \
    case ::pydl::Dtype::kDouble: {    \
      using T = double;               \
      __VA_ARGS__;                    \
    } break;                          \
    case ::pydl::Dtype::kHalf: {      \
      using T = ::pydl::Half;         \
      __VA_ARGS__;                    \
    } break;                          \
    case ::pydl::Dtype::kBFloat16: {  \
      using T = ::pydl::BFloat16;     \
      __VA_ARGS__;                    \
    } break;                          \
    default:                          \
      break;                          \
  }
