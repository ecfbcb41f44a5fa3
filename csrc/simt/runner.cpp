// Scheduler of the SIMT host runner: device threads are fibers, ready ones run in random order until they wait.
#include "runner.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace pydl::simt {
namespace {

constexpr size_t kMaxShared = 227 * 1024;
constexpr size_t kMaxStaticShared = 48 * 1024;
constexpr size_t kStackReserve = 4096;
constexpr int kMaxStaleRounds = 2000;
// Picks in a row from one block, on average, so that its stacks stay in the cache.
constexpr uint32_t kStay = 512;

std::mutex g_launch_mutex;
Runner g_runner;

uint64_t mix(uint64_t x) {  // SplitMix64's finalizer (Steele, Lea, Flood 2014)
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

template <typename Index>
std::string text(const Index& index) {
  std::ostringstream out;
  out << '(' << index.x << ',' << index.y << ',' << index.z << ')';
  return out.str();
}

std::string text(Site site) { return std::string(site.file) + ':' + std::to_string(site.line); }

std::string hex(unsigned value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

uint3 unravel(uint64_t linear, dim3 shape) {
  return {unsigned(linear % shape.x), unsigned(linear / shape.x % shape.y), unsigned(linear / shape.x / shape.y)};
}

void check_config(const LaunchConfig& c) {
  auto refuse = [&](const std::string& why) { throw Error(std::string("simt: launch of ") + c.kernel + ": " + why); };
  uint64_t threads = uint64_t(c.block.x) * c.block.y * c.block.z;
  if (threads == 0 || threads > 1024 || c.block.z > 64) refuse("block " + text(c.block) + " is not launchable");
  uint64_t blocks = uint64_t(c.grid.x) * c.grid.y * c.grid.z;
  if (blocks == 0 || c.grid.x > 0x7fffffffu || c.grid.y > 65535 || c.grid.z > 65535) {
    refuse("grid " + text(c.grid) + " is not launchable");
  }
  if (c.dynamic_shared > kMaxShared) {
    refuse(std::to_string(c.dynamic_shared) + " bytes of dynamic shared memory, at most " + std::to_string(kMaxShared) +
           " exist");
  }
  if (c.cooperative && blocks > 4096) refuse("too many blocks for a cooperative launch");
}

}  // namespace

void FreeDeleter::operator()(void* memory) const { std::free(memory); }

void Runner::run(const LaunchConfig& config, void (*body)(void*), void* closure) {
  check_config(config);
  config_ = config;
  body_ = body;
  closure_ = closure;
  error_ = nullptr;
  const char* seed = std::getenv("PYDL_SIMT_SEED");
  seed_ = seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10);
  random_state_ = mix(seed_) | 1;
  blockDim = config.block;
  gridDim = config.grid;
  size_t per_block = size_t(config.block.x) * config.block.y * config.block.z;
  uint64_t total = uint64_t(config.grid.x) * config.grid.y * config.grid.z;
  size_t resident = config.cooperative ? size_t(total) : 1;
  while (blocks_.size() < resident) blocks_.push_back(std::make_unique<Block>());
  for (auto& block : blocks_) block->shared.clear();
  stacks_.reserve(resident * per_block);
  for (uint64_t first = 0; first < total && !error_; first += resident) run_blocks(resident, first);
  if (blocks_.size() > 64) blocks_.resize(64);
  if (error_) std::rethrow_exception(error_);
}

// A permutation of 0..count-1 that needs no memory: an odd multiplier modulo the next power of two, walked until it
// falls inside.
uint64_t Runner::shuffled(uint64_t i, uint64_t count) const {
  uint64_t mask = 1;
  while (mask < count) mask <<= 1;
  mask -= 1;
  uint64_t multiplier = mix(seed_ + 1) << 3 | 5;
  uint64_t offset = mix(seed_ + 2);
  do {
    i = (i * multiplier + offset) & mask;
  } while (i >= count);
  return i;
}

uint32_t Runner::random(uint32_t bound) {  // xorshift64 (Marsaglia 2003)
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return uint32_t((random_state_ >> 32) * bound >> 32);
}

void Runner::reset_block(Block& block, uint64_t linear) {
  block.index = unravel(linear, config_.grid);
  size_t count = size_t(blockDim.x) * blockDim.y * blockDim.z;
  block.ready.clear();
  block.threads.resize(count);
  block.warps.resize((count + 31) / 32);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    size_t lanes = std::min<size_t>(32, count - 32 * w);
    block.warps[w].live = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    block.warps[w].groups.clear();
  }
  for (size_t t = 0; t < count; ++t) {
    Thread& thread = block.threads[t];
    thread.block = &block;
    thread.index = unravel(t, config_.block);
    thread.linear = int(t);
    thread.started = false;
    make_ready(thread);
  }
  for (SharedArray& array : block.shared) std::memset(array.memory.get(), 0xff, array.bytes);
  block.finished = block.waiting = block.true_predicates = 0;
  block.first_finished = block.first_waiting = -1;
}

void Runner::run_blocks(size_t count, uint64_t first) {
  runnable_.clear();
  spinning_.clear();
  favourite_ = nullptr;
  stacks_.reset();
  stale_rounds_ = 0;
  progressed_ = true;
  active_blocks_ = count;
  uint64_t total = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  for (size_t b = 0; b < count; ++b) {
    reset_block(*blocks_[b], count == 1 ? shuffled(first, total) : first + b);
  }
  unfinished_ = count * blockDim.x * blockDim.y * blockDim.z;
  launcher_ = Context{};
  Thread* thread = pick();
  enter(*thread);
  prepare(thread->context, stacks_.take(), &Runner::entry);
  switch_context(launcher_, thread->context, false);
  current_ = nullptr;
}

void Runner::entry() {
  finish_first_switch(&g_runner.launcher_);
  try {
    g_runner.thread_loop();
  } catch (...) {
    g_runner.error_ = std::current_exception();
  }
  Context gone = g_runner.current_->context;
  switch_context(gone, g_runner.launcher_, true);
  std::abort();  // a finished fiber is never resumed
}

// Runs device threads on the calling fiber's stack, for as long as the next one picked has not begun elsewhere.
void Runner::thread_loop() {
  for (;;) {
    body_(closure_);
    Thread& done = *current_;
    finish_thread(done);
    if (unfinished_ == 0) return;
    Thread* next = pick();
    if (next->started) {
      stacks_.give(done.context.stack);
      go_to(next, true);
    }
    next->context = done.context;
    enter(*next);
  }
}

void Runner::finish_thread(Thread& thread) {
  Block& block = *thread.block;
  if (block.waiting > 0) {
    fail("barrier divergence: this thread returned while thread " +
         text(block.threads[size_t(block.first_waiting)].index) + " waits at __syncthreads() " + text(block.site));
  }
  thread.wait = Wait::finished;
  if (block.finished++ == 0) block.first_finished = thread.linear;
  --unfinished_;
  progressed_ = true;
  int w = thread.linear / 32;
  Warp& warp = block.warps[size_t(w)];
  warp.live &= ~(1u << thread.linear % 32);
  for (size_t g = warp.groups.size(); g-- > 0;) {
    if (warp.groups[g].arrived == (warp.groups[g].mask & warp.live)) complete(block, w, g);
  }
}

void Runner::make_ready(Thread& thread) {
  Block& block = *thread.block;
  thread.wait = Wait::none;
  if (block.ready.empty()) {
    block.slot = runnable_.size();
    runnable_.push_back(&block);
  }
  block.ready.push_back(&thread);
}

void Runner::enter(Thread& thread) {
  current_ = &thread;
  thread.started = true;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
}

Thread* Runner::pick() {
  if (runnable_.empty()) {
    if (spinning_.empty()) fail(deadlock_report());
    stale_rounds_ = progressed_ ? 0 : stale_rounds_ + 1;
    progressed_ = false;
    if (stale_rounds_ > kMaxStaleRounds) fail(deadlock_report());
    for (Thread* thread : spinning_) make_ready(*thread);
    spinning_.clear();
  }
  bool stay = favourite_ != nullptr && !favourite_->ready.empty();
  if (!stay || (runnable_.size() > 1 && random(kStay) == 0)) favourite_ = runnable_[random(uint32_t(runnable_.size()))];
  auto& ready = favourite_->ready;
  std::swap(ready[random(uint32_t(ready.size()))], ready.back());
  Thread* next = ready.back();
  ready.pop_back();
  if (ready.empty()) {
    runnable_[favourite_->slot] = runnable_.back();
    runnable_[favourite_->slot]->slot = favourite_->slot;
    runnable_.pop_back();
  }
  return next;
}

void Runner::go_to(Thread* next, bool current_is_done) {
  Thread& from = *current_;
  if (!next->started) prepare(next->context, stacks_.take(), &Runner::entry);
  enter(*next);
  switch_context(from.context, next->context, current_is_done);
}

void Runner::suspend(Wait wait) {
  Thread& self = *current_;
  char here;
  if (reinterpret_cast<uintptr_t>(&here) - reinterpret_cast<uintptr_t>(self.context.stack.base) < kStackReserve &&
      !PYDL_SIMT_ASAN) {
    fail("the thread's stack is nearly used up: set PYDL_SIMT_STACK_KB");
  }
  self.wait = wait;
  if (wait == Wait::spin) spinning_.push_back(&self);
  Thread* next = pick();
  if (next == &self) return;
  go_to(next, false);
}

BarrierResult Runner::barrier(Site site, bool predicate) {
  Thread& self = *current_;
  Block& block = *self.block;
  if (block.finished > 0) {
    fail("barrier divergence: this thread is at __syncthreads() " + text(site) + " but thread " +
         text(block.threads[size_t(block.first_finished)].index) + " returned");
  }
  if (block.waiting == 0) {
    block.site = site;
    block.first_waiting = self.linear;
    block.true_predicates = 0;
  } else if (!same(block.site, site)) {
    fail("barrier divergence: this thread is at __syncthreads() " + text(site) + " but thread " +
         text(block.threads[size_t(block.first_waiting)].index) + " waits at " + text(block.site));
  }
  block.true_predicates += predicate;
  int size = int(block.threads.size());
  if (++block.waiting < size) {
    suspend(Wait::barrier);
    return block.result;
  }
  block.result = {block.true_predicates, block.true_predicates == size, block.true_predicates > 0};
  block.waiting = 0;
  progressed_ = true;
  for (Thread& thread : block.threads) {
    if (&thread != &self) make_ready(thread);
  }
  return block.result;
}

void Runner::complete(Block& block, int w, size_t g) {
  Warp& warp = block.warps[size_t(w)];
  WarpGroup group = warp.groups[g];
  warp.groups.erase(warp.groups.begin() + std::ptrdiff_t(g));
  group.resolve(group.lanes, group.arrived);
  progressed_ = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(group.arrived >> lane & 1)) continue;
    Thread& thread = block.threads[size_t(w * 32 + lane)];
    if (&thread != current_) make_ready(thread);
  }
}

void Runner::warp(unsigned mask, Site site, void* local, Resolve resolve) {
  Thread& self = *current_;
  int w = self.linear / 32;
  unsigned bit = 1u << self.linear % 32;
  Warp& warp = self.block->warps[size_t(w)];
  if (!(mask & bit)) fail("warp operation " + text(site) + ": mask " + hex(mask) + " leaves out the calling lane");
  size_t g = 0;
  while (g < warp.groups.size() && warp.groups[g].mask != mask) ++g;
  if (g == warp.groups.size()) warp.groups.push_back(WarpGroup{mask, 0, site, resolve, {}});
  WarpGroup& group = warp.groups[g];
  if (group.resolve != resolve || !same(group.site, site)) {
    fail("warp divergence: this lane is at " + text(site) + " but lanes " + hex(group.arrived) +
         " of the same mask wait at " + text(group.site));
  }
  group.arrived |= bit;
  group.lanes[self.linear % 32] = local;
  if (group.arrived == (mask & warp.live)) {
    complete(*self.block, w, g);
  } else {
    suspend(Wait::warp);
  }
}

void Runner::spin() { suspend(Wait::spin); }

void* Runner::shared(size_t bytes, size_t alignment, const void* key) {
  Block& block = *current_->block;
  for (const SharedArray& array : block.shared) {
    if (array.key == key) return array.memory.get();
  }
  return allocate(block, bytes, alignment, key);
}

void* Runner::allocate(Block& block, size_t bytes, size_t alignment, const void* key) {
  size_t static_bytes = key == nullptr ? 0 : bytes;
  size_t total = bytes;
  for (const SharedArray& array : block.shared) {
    total += array.bytes;
    if (array.key != nullptr) static_bytes += array.bytes;
  }
  if (static_bytes > kMaxStaticShared) {
    fail("static shared memory of " + std::to_string(static_bytes) + " bytes, at most 49152 exist");
  }
  if (total > kMaxShared) fail("shared memory of " + std::to_string(total) + " bytes, at most 232448 exist");
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  block.shared.push_back(SharedArray{key, bytes, std::unique_ptr<void, FreeDeleter>(memory)});
  return memory;
}

std::string Runner::deadlock_report() const {
  std::ostringstream out;
  out << "deadlock: no thread can go on";
  int shown = 0;
  for (size_t b = 0; b < active_blocks_ && shown < 4; ++b) {
    const Block& block = *blocks_[b];
    if (block.finished == int(block.threads.size())) continue;
    ++shown;
    out << "; block " << text(block.index) << ": " << block.finished << " of " << block.threads.size()
        << " threads returned";
    if (block.waiting > 0) out << ", " << block.waiting << " wait at __syncthreads() " << text(block.site);
    int spins = 0;
    for (const Thread& thread : block.threads) spins += thread.wait == Wait::spin;
    if (spins > 0) out << ", " << spins << " spin in spin_pause()";
    for (size_t w = 0; w < block.warps.size(); ++w) {
      for (const WarpGroup& group : block.warps[w].groups) {
        out << ", lanes " << hex(group.arrived) << " of warp " << w << " wait at " << text(group.site) << " for lanes "
            << hex(group.mask & block.warps[w].live & ~group.arrived);
      }
    }
  }
  if (!config_.cooperative) out << " (the launch is not cooperative: blocks run one after the other)";
  return out.str();
}

void run(const LaunchConfig& config, void (*body)(void*), void* closure) {
  std::lock_guard<std::mutex> lock(g_launch_mutex);
  g_runner.run(config, body, closure);
}

void fail(const std::string& message) {
  const Thread* thread = g_runner.current();
  std::string where = std::string("simt: kernel ") + g_runner.config().kernel;
  if (thread != nullptr) where += ", block " + text(thread->block->index) + ", thread " + text(thread->index);
  throw Error(where + ": " + message);
}

BarrierResult block_barrier(Site site, bool predicate) { return g_runner.barrier(site, predicate); }

void warp_collective(unsigned mask, Site site, void* local, Resolve resolve) {
  g_runner.warp(mask, site, local, resolve);
}

unsigned live_lanes() {
  const Thread& thread = *g_runner.current();
  return thread.block->warps[size_t(thread.linear / 32)].live;
}

int lane_id() { return g_runner.current()->linear % 32; }

void* shared_static(size_t bytes, size_t alignment, const void* key) { return g_runner.shared(bytes, alignment, key); }

void* shared_dynamic(size_t alignment) {
  size_t bytes = g_runner.config().dynamic_shared;
  if (bytes == 0) fail("dynamic shared memory used, but the launch asked for none");
  return g_runner.shared(bytes, alignment, nullptr);
}

void spin_pause() { g_runner.spin(); }

void note_progress() { g_runner.progress(); }

bool launch_is_cooperative() { return g_runner.config().cooperative; }

}  // namespace pydl::simt
