// What device code and launchers see of the SIMT host runner. See csrc/simt/README.md.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "pydl_simt/types.h"

namespace pydl::simt {

// Where a barrier or a warp operation was called. As a default argument it names the caller's line.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Raises Error from a device thread; the message is prefixed with the kernel, the block and the thread.
[[noreturn]] void fail(const std::string& message);

struct LaunchConfig {
  const char* kernel;
  dim3 grid;
  dim3 block;
  size_t dynamic_shared;
  bool cooperative;  // all blocks are resident at once: grid barriers and flags between blocks work
};

// Runs body(closure) once per device thread; returns when all have finished, throws what one of them threw.
void run(const LaunchConfig& config, void (*body)(void*), void* closure);

struct BarrierResult {
  int count;  // threads with a true predicate
  bool all;
  bool any;
};

BarrierResult block_barrier(Site site, bool predicate);

// Waits until every live lane of `mask` is here, then one of them runs resolve(lanes, members) for all: lanes[i] is
// lane i's `local`, null for lanes outside `members`.
using Resolve = void (*)(void** lanes, unsigned members);
void warp_collective(unsigned mask, Site site, void* local, Resolve resolve);

// Lanes of the calling warp that have not returned.
unsigned live_lanes();
int lane_id();

// Shared memory of the calling block: one exact-size heap block per key, filled with 0xff (NaN).
void* shared_static(size_t bytes, size_t alignment, const void* key);
void* shared_dynamic(size_t alignment);

// Lets other threads run. Every loop that waits for another thread's store must call it.
void spin_pause();

// An atomic changed memory: waiting threads may go on, so this round is no deadlock.
void note_progress();

bool launch_is_cooperative();

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  using Packed = std::tuple<std::decay_t<Params>...>;
  std::pair<void (*)(Params...), Packed> call(kernel, Packed(std::forward<Args>(args)...));
  run(
      config,
      [](void* closure) {
        auto& [function, packed] = *static_cast<decltype(call)*>(closure);
        std::apply(function, packed);
      },
      &call);
}

}  // namespace pydl::simt

// Set by the runner at every switch between threads.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;
