#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if PYDL_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)

// swapcontext costs two system calls a switch for the signal mask; this saves only what the calling convention asks.
asm(R"(
.text
.globl pydl_simt_switch
.hidden pydl_simt_switch
.type pydl_simt_switch, @function
pydl_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pydl_simt_switch, .-pydl_simt_switch
)");

extern "C" void pydl_simt_switch(void** save, void* load) __attribute__((visibility("hidden")));

#else

#include <ucontext.h>

#endif

namespace pydl::simt {
namespace {

constexpr size_t kGuard = 4096;
// A guard page per stack splits its mapping; the limit is 65,530 mappings per process.
constexpr size_t kGuardedStacks = 4096;

size_t configured_stack_size() {
  size_t kib = PYDL_SIMT_ASAN ? 256 : 64;
  if (const char* text = std::getenv("PYDL_SIMT_STACK_KB")) {
    long value = std::strtol(text, nullptr, 10);
    if (value >= 16 && value <= 65536) kib = size_t(value);
  }
  return kib * 1024;
}

}  // namespace

StackArena::StackArena() : stack_size_(configured_stack_size()) {}

StackArena::~StackArena() { unmap(); }

void StackArena::unmap() {
  if (base_ != nullptr) munmap(base_, capacity_ * stack_size_);
  base_ = nullptr;
  capacity_ = guarded_ = 0;
}

void StackArena::reserve(size_t count) {
  // A small request after a huge one gives the memory back.
  bool oversized = capacity_ > 8192 && count * 4 < capacity_;
  if (count > capacity_ || oversized) {
    unmap();
    void* memory =
        mmap(nullptr, count * stack_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    capacity_ = count;
  }
  reset();
}

void StackArena::reset() {
  free_.clear();
  fresh_ = 0;
}

Stack StackArena::take() {
  Stack stack = free_.empty() ? fresh() : free_.back();
  if (!free_.empty()) free_.pop_back();
#if PYDL_SIMT_ASAN
  // A fiber that ended in its loop, or was abandoned after an error, leaves its frames' redzones behind.
  __asan_unpoison_memory_region(stack.base, stack.size);
#endif
  return stack;
}

Stack StackArena::fresh() {
  if (fresh_ == capacity_) throw std::bad_alloc();
  char* base = base_ + fresh_ * stack_size_;
  if (fresh_ == guarded_ && fresh_ < kGuardedStacks) {
    mprotect(base, kGuard, PROT_NONE);
    ++guarded_;
  }
  // Equal stacks would compete for the same cache sets: their tops are moved apart.
  size_t shift = fresh_ % 61 * 64;
  ++fresh_;
  return {base + kGuard, stack_size_ - kGuard - shift};
}

#if defined(__x86_64__)

void prepare(Context& context, Stack stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack.base + stack.size) & ~uintptr_t(15);
  auto** slots = reinterpret_cast<void**>(top);
  slots[-1] = nullptr;  // where entry would return to
  slots[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) slots[-i] = nullptr;
  context = Context{slots - 8, nullptr, stack};
}

static void jump(Context& from, Context& to) { pydl_simt_switch(&from.saved, to.saved); }

#else

void prepare(Context& context, Stack stack, void (*entry)()) {
  auto* machine = new (stack.base) ucontext_t;  // lives at the far end of its own stack
  getcontext(machine);
  size_t used = (sizeof(ucontext_t) + 63) / 64 * 64;
  machine->uc_stack.ss_sp = stack.base + used;
  machine->uc_stack.ss_size = stack.size - used;
  machine->uc_link = nullptr;
  makecontext(machine, entry, 0);
  context = Context{machine, nullptr, stack};
}

static void jump(Context& from, Context& to) {
  ucontext_t launcher;
  bool is_launcher = from.saved == nullptr;
  if (is_launcher) from.saved = &launcher;
  swapcontext(static_cast<ucontext_t*>(from.saved), static_cast<ucontext_t*>(to.saved));
  if (is_launcher) from.saved = nullptr;
}

#endif

void switch_context(Context& from, Context& to, bool from_is_done) {
#if PYDL_SIMT_ASAN
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.fake_stack, to.stack.base, to.stack.size);
  jump(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  (void)from_is_done;
  jump(from, to);
#endif
}

void finish_first_switch(Context* launcher) {
#if PYDL_SIMT_ASAN
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (launcher->stack.base == nullptr) {
    launcher->stack = {static_cast<char*>(const_cast<void*>(bottom)), size};
  }
#else
  (void)launcher;
#endif
}

}  // namespace pydl::simt
