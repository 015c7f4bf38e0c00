#include "emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace moba::cuda::emulation {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;  // the sums of a tile, with room for AddressSanitizer's zones

thread_local Fiber* resuming = nullptr;

#if defined(__SANITIZE_ADDRESS__)
void about_to_switch(void** fake, const void* stack, std::size_t bytes) {
  __sanitizer_start_switch_fiber(fake, stack, bytes);
}
void switched(void* fake, const void** from, std::size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake, from, bytes);
}
void forget_frames(std::byte* stack) {
  __asan_unpoison_memory_region(stack, kStackBytes);
}
#else
void about_to_switch(void**, const void*, std::size_t) {}
void switched(void*, const void**, std::size_t*) {}
void forget_frames(std::byte*) {}
#endif

}  // namespace

#if defined(__x86_64__)

// Saves the callee-saved registers and changes stacks. swapcontext would make a system call for the signal
// mask each time, and a device kernel switches millions of times.
extern "C" void moba_emulation_switch(void** save, void* load);
asm(R"(
.text
.hidden moba_emulation_switch
.globl moba_emulation_switch
.type moba_emulation_switch, @function
moba_emulation_switch:
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
.size moba_emulation_switch, .-moba_emulation_switch
)");

namespace {

/// Prepares a stack on which the switch's pops find zeros and its `ret` finds `entry`.
void* prepared(std::byte* stack, void (*entry)(), void*) {
  constexpr std::size_t kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(entry);
  for (std::size_t i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return top;
}

void change(void** save, void* load) {
  moba_emulation_switch(save, load);
}

}  // namespace

#else

namespace {

void* prepared(std::byte* stack, void (*entry)(), void* old) {
  auto* context = old != nullptr ? static_cast<ucontext_t*>(old) : new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void change(void** save, void* load) {
  if (*save == nullptr) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}

}  // namespace

#endif

Fiber::Fiber() {
  void* memory =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<std::byte*>(memory);
}

Fiber::~Fiber() {
  forget_frames(stack_);
  munmap(stack_, kStackBytes);
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(here_);
  delete static_cast<ucontext_t*>(host_);
#endif
}

void Fiber::first_steps() {
  Fiber* self = resuming;
  switched(nullptr, &self->host_stack_, &self->host_stack_bytes_);
  self->entry_();
  std::abort();
}

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  forget_frames(stack_);
  here_ = prepared(stack_, &Fiber::first_steps, here_);
}

void Fiber::resume() {
  resuming = this;
  about_to_switch(&fake_host_, stack_, kStackBytes);
  change(&host_, here_);
  switched(fake_host_, nullptr, nullptr);
}

void Fiber::leave(bool for_good) {
  about_to_switch(for_good ? nullptr : &fake_here_, host_stack_, host_stack_bytes_);
  change(&here_, host_);
  switched(fake_here_, &host_stack_, &host_stack_bytes_);
}

}  // namespace moba::cuda::emulation
