// Stacks and the switch between them: the machine-dependent part of the SIMT host runner.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define PYDL_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PYDL_SIMT_ASAN 1
#endif
#endif
#ifndef PYDL_SIMT_ASAN
#define PYDL_SIMT_ASAN 0
#endif

namespace pydl::simt {

struct Stack {
  char* base = nullptr;
  size_t size = 0;
};

// A suspended flow of control. `stack` is where it runs; for the thread that launched, ASan tells the bounds.
struct Context {
  void* saved = nullptr;
  void* fake_stack = nullptr;
  Stack stack;
};

// Stacks cut from one reservation, since 32,768 separate mappings pass the kernel's limit.
class StackArena {
 public:
  StackArena();
  ~StackArena();
  StackArena(const StackArena&) = delete;
  StackArena& operator=(const StackArena&) = delete;

  void reserve(size_t count);  // all stacks must be free
  Stack take();
  void give(Stack stack) { free_.push_back(stack); }
  void reset();  // every stack is free again

 private:
  void unmap();
  Stack fresh();

  char* base_ = nullptr;
  size_t stack_size_;
  size_t capacity_ = 0;
  size_t fresh_ = 0;    // stacks from here on are untouched since reset()
  size_t guarded_ = 0;  // stacks before this one have their guard page
  std::vector<Stack> free_;
};

// Makes `context` start in entry() on `stack`; entry must never return and must call finish_switch first.
void prepare(Context& context, Stack stack, void (*entry)());

// Leaves `from` and goes on in `to`. With `from_is_done`, `from` is never resumed.
void switch_context(Context& from, Context& to, bool from_is_done);

// First statement of an entry function. `launcher` gets the bounds of the stack that was left.
void finish_first_switch(Context* launcher);

}  // namespace pydl::simt
