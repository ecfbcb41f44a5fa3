// Shared memory in one spelling. On the host each block gets an exact-size heap array, so ASan sees an overflow by one.
//
//   PYDL_SHARED(float, tile, 32 * 33);   tile[i], static; use the name as a pointer: sizeof(tile) differs on the host
//   PYDL_DYN_SHARED(float, row);         row[i], the launch's dynamic bytes; one per kernel, cut it up by hand
#pragma once

#include "common/device.h"

#ifdef PYDL_SIMT

#define PYDL_SHARED(type, name, n)                                                                          \
  static_assert((n) > 0, "shared arrays have a positive constant size");                                    \
  type* const name = static_cast<type*>(::pydl::simt::shared_static(sizeof(type) * (n), alignof(type), [] { \
    static const char key = 0;                                                                              \
    return static_cast<const void*>(&key);                                                                  \
  }()))

#define PYDL_DYN_SHARED(type, name) type* const name = static_cast<type*>(::pydl::simt::shared_dynamic(128))

#else

#define PYDL_SHARED(type, name, n) __shared__ type name[n]

#define PYDL_DYN_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char pydl_dyn_shared[]; \
  type* const name = reinterpret_cast<type*>(pydl_dyn_shared)

#endif
