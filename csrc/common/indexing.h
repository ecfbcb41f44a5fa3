// From a linear item to coordinates, right beyond 2^31 items and cheap below.
#pragma once

#include "common/device.h"

namespace pydl {

// Splits off the last digit of `item` in the given base: returns item % base and leaves item / base. A 64-bit division
// costs about 100 instructions, so it is done in 32 bits while the item fits.
__host__ __device__ inline int take_digit(uint64_t& item, int base) {
  if (item >> 32 == 0) {
    uint32_t whole = uint32_t(item);
    uint32_t quotient = whole / uint32_t(base);
    item = quotient;
    return int(whole - quotient * uint32_t(base));
  }
  uint64_t quotient = item / uint64_t(base);
  int digit = int(item - quotient * uint64_t(base));
  item = quotient;
  return digit;
}

__device__ inline uint64_t thread_item() { return uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

}  // namespace pydl
