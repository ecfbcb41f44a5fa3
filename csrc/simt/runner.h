// State of one launch of the SIMT host runner.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "pydl_simt/runtime.h"

namespace pydl::simt {

struct Block;

enum class Wait : uint8_t { none, barrier, warp, spin, finished };

struct Thread {
  Context context;
  Block* block = nullptr;
  uint3 index{};
  int linear = 0;
  bool started = false;
  Wait wait = Wait::none;
};

// Lanes that wait for each other in one warp operation.
struct WarpGroup {
  unsigned mask;
  unsigned arrived;
  Site site;
  Resolve resolve;
  void* lanes[32];
};

struct Warp {
  unsigned live = 0;
  std::vector<WarpGroup> groups;
};

struct FreeDeleter {
  void operator()(void* memory) const;
};

struct SharedArray {
  const void* key;
  size_t bytes;
  std::unique_ptr<void, FreeDeleter> memory;
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;
  std::vector<Thread*> ready;
  size_t slot = 0;  // in Runner::runnable_, while `ready` is not empty
  int finished = 0;
  int first_finished = -1;

  int waiting = 0;  // at the block barrier
  Site site{};
  int first_waiting = -1;
  int true_predicates = 0;
  BarrierResult result{};
};

class Runner {
 public:
  void run(const LaunchConfig& config, void (*body)(void*), void* closure);

  BarrierResult barrier(Site site, bool predicate);
  void warp(unsigned mask, Site site, void* local, Resolve resolve);
  void spin();
  void progress() { progressed_ = true; }
  void* shared(size_t bytes, size_t alignment, const void* key);

  const LaunchConfig& config() const { return config_; }
  const Thread* current() const { return current_; }

 private:
  static void entry();
  void run_blocks(size_t count, uint64_t first);
  void reset_block(Block& block, uint64_t linear);
  uint64_t shuffled(uint64_t i, uint64_t count) const;
  uint32_t random(uint32_t bound);
  void thread_loop();
  void finish_thread(Thread& thread);
  void make_ready(Thread& thread);
  void suspend(Wait wait);
  Thread* pick();
  void go_to(Thread* next, bool current_is_done);
  void enter(Thread& thread);
  void complete(Block& block, int warp, size_t group);
  void* allocate(Block& block, size_t bytes, size_t alignment, const void* key);
  std::string deadlock_report() const;

  LaunchConfig config_{};
  void (*body_)(void*) = nullptr;
  void* closure_ = nullptr;
  std::vector<std::unique_ptr<Block>> blocks_;
  size_t active_blocks_ = 0;
  std::vector<Block*> runnable_;  // blocks with ready threads
  Block* favourite_ = nullptr;
  std::vector<Thread*> spinning_;
  Thread* current_ = nullptr;
  Context launcher_;
  StackArena stacks_;
  std::exception_ptr error_;
  uint64_t seed_ = 0;
  uint64_t random_state_ = 0;
  size_t unfinished_ = 0;
  int stale_rounds_ = 0;
  bool progressed_ = false;
};

}  // namespace pydl::simt
