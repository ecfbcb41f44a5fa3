#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/isa.h"

namespace pydl {
namespace {

int supported_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 ? (avx512 ? 2 : 1) : 0;
#else
  return 0;
#endif
}

int chosen_level() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  const int supported = supported_level();
  const char* wanted = std::getenv("PYDL_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return supported;
  for (int level = 0; level < 3; ++level) {
    if (std::strcmp(wanted, names[level]) == 0) return level < supported ? level : supported;
  }
  // An exception here would end the process: this runs while the library is being loaded.
  std::fprintf(stderr, "pydl: PYDL_CPU_CAPABILITY=%s ignored: must be baseline, avx2 or avx512\n", wanted);
  return supported;
}

const int level = chosen_level();

}  // namespace

int cpu_level() { return level; }

}  // namespace pydl
