/// Ctrl-C during a call on the CPU. Python runs its signal handlers only between instructions of its own, so
/// the main thread asks for them while it computes.
#pragma once

#include <chrono>
#include <thread>

namespace moba::pytorch {

/// The handlers' part in one call.
class Interrupt {
 public:
  /// Runs pending handlers if this is Python's main thread and the last time was 100 ms ago. Returns whether
  /// one has raised an exception, which is kept for `moba_raise_interrupt`. In a process without Python none
  /// does.
  bool run_handlers();

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{100};

  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point last_ = Clock::now();
};

}  // namespace moba::pytorch
