// Barriers, shuffles, votes and warp reductions with CUDA's names.
#pragma once

#include <cstring>

#include "pydl_simt/runtime.h"

namespace pydl::simt {

template <typename T>
struct Exchange {
  T value;
  T result;
  int source;  // lane to read, -1: keep the own value
};

// Reading a lane that takes no part is undefined on a GPU: it gives 0xff bytes (NaN) here.
template <typename T>
void resolve_exchange(void** lanes, unsigned members) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(members >> lane & 1)) continue;
    auto* own = static_cast<Exchange<T>*>(lanes[lane]);
    auto* from = own->source < 0 ? own : static_cast<Exchange<T>*>(lanes[own->source]);
    if (from != nullptr) {
      own->result = from->value;
    } else {
      std::memset(static_cast<void*>(&own->result), 0xff, sizeof(T));
    }
  }
}

template <typename T>
T exchange(unsigned mask, T value, int source, Site site) {
  Exchange<T> local{value, value, source};
  warp_collective(mask, site, &local, &resolve_exchange<T>);
  return local.result;
}

struct Vote {
  bool predicate;
  unsigned ballot;
  unsigned members;
};

inline void resolve_vote(void** lanes, unsigned members) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (members >> lane & 1) ballot |= unsigned(static_cast<Vote*>(lanes[lane])->predicate) << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(members >> lane & 1)) continue;
    static_cast<Vote*>(lanes[lane])->ballot = ballot;
    static_cast<Vote*>(lanes[lane])->members = members;
  }
}

inline Vote vote(unsigned mask, bool predicate, Site site) {
  Vote local{predicate, 0, 0};
  warp_collective(mask, site, &local, &resolve_vote);
  return local;
}

template <typename T>
struct Gather {
  T values[32];
  unsigned members;
  T value;
};

template <typename T>
void resolve_gather(void** lanes, unsigned members) {
  for (int to = 0; to < 32; ++to) {
    if (!(members >> to & 1)) continue;
    auto* own = static_cast<Gather<T>*>(lanes[to]);
    own->members = members;
    for (int from = 0; from < 32; ++from) {
      if (members >> from & 1) own->values[from] = static_cast<Gather<T>*>(lanes[from])->value;
    }
  }
}

template <typename T>
Gather<T> gather(unsigned mask, T value, Site site) {
  Gather<T> local{{}, 0, value};
  warp_collective(mask, site, &local, &resolve_gather<T>);
  return local;
}

template <typename T, typename F>
T reduce(unsigned mask, T value, Site site, F combine) {
  Gather<T> all = gather(mask, value, site);
  bool first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(all.members >> lane & 1)) continue;
    result = first ? all.values[lane] : combine(result, all.values[lane]);
    first = false;
  }
  return result;
}

inline void resolve_nothing(void**, unsigned) {}

inline int segment(int width) { return lane_id() & ~(width - 1); }

}  // namespace pydl::simt

inline void __syncthreads(pydl::simt::Site site = pydl::simt::Site::here()) { pydl::simt::block_barrier(site, false); }

inline int __syncthreads_count(int predicate, pydl::simt::Site site = pydl::simt::Site::here()) {
  return pydl::simt::block_barrier(site, predicate != 0).count;
}

inline int __syncthreads_and(int predicate, pydl::simt::Site site = pydl::simt::Site::here()) {
  return pydl::simt::block_barrier(site, predicate != 0).all;
}

inline int __syncthreads_or(int predicate, pydl::simt::Site site = pydl::simt::Site::here()) {
  return pydl::simt::block_barrier(site, predicate != 0).any;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, pydl::simt::Site site = pydl::simt::Site::here()) {
  pydl::simt::warp_collective(mask, site, &mask, &pydl::simt::resolve_nothing);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, pydl::simt::Site site = pydl::simt::Site::here()) {
  return pydl::simt::exchange(mask, value, pydl::simt::segment(width) + (lane & (width - 1)), site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 pydl::simt::Site site = pydl::simt::Site::here()) {
  int source = pydl::simt::lane_id() - int(delta);
  return pydl::simt::exchange(mask, value, source < pydl::simt::segment(width) ? -1 : source, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   pydl::simt::Site site = pydl::simt::Site::here()) {
  int source = pydl::simt::lane_id() + int(delta);
  return pydl::simt::exchange(mask, value, source >= pydl::simt::segment(width) + width ? -1 : source, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  pydl::simt::Site site = pydl::simt::Site::here()) {
  int source = pydl::simt::lane_id() ^ lane_mask;
  return pydl::simt::exchange(mask, value, source >= pydl::simt::segment(width) + width ? -1 : source, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, pydl::simt::Site site = pydl::simt::Site::here()) {
  return pydl::simt::vote(mask, predicate != 0, site).ballot;
}

inline int __any_sync(unsigned mask, int predicate, pydl::simt::Site site = pydl::simt::Site::here()) {
  return pydl::simt::vote(mask, predicate != 0, site).ballot != 0;
}

inline int __all_sync(unsigned mask, int predicate, pydl::simt::Site site = pydl::simt::Site::here()) {
  auto result = pydl::simt::vote(mask, predicate != 0, site);
  return result.ballot == result.members;
}

// On a GPU this is the set of lanes that happen to be converged; here, all that have not returned.
inline unsigned __activemask() { return pydl::simt::live_lanes(); }

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, pydl::simt::Site site = pydl::simt::Site::here()) {
  auto all = pydl::simt::gather(mask, value, site);
  unsigned equal = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (all.members >> lane & 1) equal |= unsigned(std::memcmp(&all.values[lane], &value, sizeof(T)) == 0) << lane;
  }
  return equal;
}

#define PYDL_SIMT_REDUCE(name, type, expression)                                                                    \
  inline type __reduce_##name##_sync(unsigned mask, type value, pydl::simt::Site site = pydl::simt::Site::here()) { \
    return pydl::simt::reduce(mask, value, site, [](type a, type b) -> type { return expression; });                \
  }
PYDL_SIMT_REDUCE(add, unsigned, a + b)
PYDL_SIMT_REDUCE(add, int, int(unsigned(a) + unsigned(b)))
PYDL_SIMT_REDUCE(min, unsigned, a < b ? a : b)
PYDL_SIMT_REDUCE(min, int, a < b ? a : b)
PYDL_SIMT_REDUCE(max, unsigned, a > b ? a : b)
PYDL_SIMT_REDUCE(max, int, a > b ? a : b)
PYDL_SIMT_REDUCE(and, unsigned, a& b)
PYDL_SIMT_REDUCE(or, unsigned, a | b)
PYDL_SIMT_REDUCE(xor, unsigned, a ^ b)
#undef PYDL_SIMT_REDUCE
