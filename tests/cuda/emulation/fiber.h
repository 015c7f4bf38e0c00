#pragma once

#include <cstddef>

namespace moba::cuda::emulation {

/// A stack of its own and a place in the code: what a thread of the device is while its kernel runs on the
/// host. AddressSanitizer is told of every switch.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// The next `resume` calls `entry`, which must not return: its last act is to `leave`.
  void start(void (*entry)());
  /// Runs the fiber until it leaves.
  void resume();
  /// Called on the fiber: goes back to the code that resumed it. `for_good`: it will not be resumed.
  void leave(bool for_good);

 private:
  std::byte* stack_ = nullptr;
  void* here_ = nullptr;
  void* host_ = nullptr;
  const void* host_stack_ = nullptr;
  std::size_t host_stack_bytes_ = 0;
  void* fake_here_ = nullptr;
  void* fake_host_ = nullptr;
  void (*entry_)() = nullptr;

  static void first_steps();
};

}  // namespace moba::cuda::emulation
