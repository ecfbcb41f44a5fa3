// What the files of local response normalisation share: y = x / (k + alpha / size * sum of x^2 over a window of
// channels)^beta. The first part is plain data and is compiled at every ISA level.
#pragma once

#include "common/channels.h"

namespace pydl {

// The window of channel c is [c - before, c + after], cut to the channels there are.
struct ResponseNorm {
  Channels shape;
  int64_t before, after, window;  // window: before + after + 1
  double scale, beta, k;          // scale: alpha / size
};

}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {
namespace {

inline ResponseNorm response_norm(const char* op, const Layout& layout, int64_t size, double alpha, double beta,
                                  double k) {
  STD_TORCH_CHECK(size >= 1, op, ": size must be positive, got ", size);
  const Channels shape = layout.channels();
  const int64_t most = std::max<int64_t>(shape.channels - 1, 0);
  const int64_t before = std::min(size / 2, most), after = std::min((size - 1) / 2, most);
  return {shape, before, after, before + after + 1, alpha / double(size), beta, k};
}

}  // namespace
}  // namespace pydl

#endif
