#pragma once

#include <cstddef>

namespace moba::cuda::emulation {

/// Stack and position in the code, as which a device thread runs on the host. Announces every switch to
/// AddressSanitizer.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Makes the next `resume` call `entry`, which must not return: its last call is `leave`.
  void start(void (*entry)());
  /// Runs the fiber until it leaves.
  void resume();
  /// Returns to the code that resumed the fiber, on which it is called. `for_good`: the fiber will not be
  /// resumed.
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
