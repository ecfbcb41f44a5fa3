// Atomics with CUDA's names. One OS thread runs all device threads, so plain reads and writes are atomic.
#pragma once

#include "pydl_simt/runtime.h"

namespace pydl::simt {

template <typename T, typename F>
T update(T* address, F next) {
  T old = *address;
  T value = next(old);
  if (!(value == old)) note_progress();
  *address = value;
  return old;
}

}  // namespace pydl::simt

#define PYDL_SIMT_ATOMIC(name, type, expression)                                                           \
  inline type atomic##name(type* address, type value) {                                                    \
    return pydl::simt::update(address, [value]([[maybe_unused]] type old) -> type { return expression; }); \
  }                                                                                                        \
  inline type atomic##name##_block(type* address, type value) { return atomic##name(address, value); }
#define PYDL_SIMT_ATOMIC_INTEGER(type, unsigned_type)                                                                 \
  PYDL_SIMT_ATOMIC(Add, type, static_cast<type>(static_cast<unsigned_type>(old) + static_cast<unsigned_type>(value))) \
  PYDL_SIMT_ATOMIC(Min, type, old < value ? old : value)                                                              \
  PYDL_SIMT_ATOMIC(Max, type, old > value ? old : value)                                                              \
  PYDL_SIMT_ATOMIC(Exch, type, value)                                                                                 \
  PYDL_SIMT_ATOMIC(And, type, static_cast<type>(old & value))                                                         \
  PYDL_SIMT_ATOMIC(Or, type, static_cast<type>(old | value))                                                          \
  PYDL_SIMT_ATOMIC(Xor, type, static_cast<type>(old ^ value))                                                         \
  inline type atomicCAS(type* address, type compare, type value) {                                                    \
    return pydl::simt::update(address, [=](type old) { return old == compare ? value : old; });                       \
  }

PYDL_SIMT_ATOMIC_INTEGER(int, unsigned)
PYDL_SIMT_ATOMIC_INTEGER(unsigned, unsigned)
PYDL_SIMT_ATOMIC_INTEGER(unsigned long long, unsigned long long)
PYDL_SIMT_ATOMIC(Min, long long, old < value ? old : value)
PYDL_SIMT_ATOMIC(Max, long long, old > value ? old : value)
PYDL_SIMT_ATOMIC(Sub, int, int(unsigned(old) - unsigned(value)))
PYDL_SIMT_ATOMIC(Sub, unsigned, old - value)
PYDL_SIMT_ATOMIC(Inc, unsigned, old >= value ? 0u : old + 1u)
PYDL_SIMT_ATOMIC(Add, float, old + value)
PYDL_SIMT_ATOMIC(Add, double, old + value)
PYDL_SIMT_ATOMIC(Exch, float, value)
#undef PYDL_SIMT_ATOMIC_INTEGER
#undef PYDL_SIMT_ATOMIC

// Sequential consistency holds: device threads only change places inside the runner.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
