// Entry points that ctypes can call: they return 0, or 1 with the exception's text in `error`.
#pragma once

#include <cstdio>
#include <exception>

#include "common/launch.h"

constexpr int kErrorBytes = 2048;

template <typename F>
int guarded(char* error, F body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, kErrorBytes, "%s", e.what());
    return 1;
  }
}

#define UNIT_EXPORT extern "C" __attribute__((visibility("default"))) int
