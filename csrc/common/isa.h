// Which of the three compiled copies of a CPU kernel runs. Every csrc/cpu/<op>.cpp is compiled once per level with
// PYDL_ISA=baseline|avx2|avx512 and PYDL_ISA_LEVEL=0|1|2; its kernels live in namespace pydl::PYDL_ISA.
#pragma once

namespace pydl {

// 0 baseline (x86-64-v2), 1 AVX2, 2 AVX-512: the lower of what the processor has and of the environment variable
// PYDL_CPU_CAPABILITY (baseline, avx2, avx512). Settled when the library is loaded.
int cpu_level();

}  // namespace pydl

// Declares the entry point `fn` of all three copies; to be used in namespace pydl, outside PYDL_ISA.
#define PYDL_CPU_DECLARE(ret, fn, ...) \
  namespace baseline {                 \
  ret fn(__VA_ARGS__);                 \
  }                                    \
  namespace avx2 {                     \
  ret fn(__VA_ARGS__);                 \
  }                                    \
  namespace avx512 {                   \
  ret fn(__VA_ARGS__);                 \
  }

// The copy of `fn` for this machine: PYDL_CPU_DISPATCH(fn)(args...).
#define PYDL_CPU_DISPATCH(fn) \
  (::pydl::cpu_level() == 2 ? ::pydl::avx512::fn : ::pydl::cpu_level() == 1 ? ::pydl::avx2::fn : ::pydl::baseline::fn)
