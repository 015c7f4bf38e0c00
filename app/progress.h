#pragma once

#include <chrono>
#include <string>
#include <utility>

namespace moba::app {

inline constexpr int kInterruptedCode = 130;  // what shells expect after Ctrl-C

/// Thrown out of work that the user gave up.
struct Interrupted {};

/// From now on Ctrl-C is noted; asked twice, it ends the program at once.
void note_interrupts();
bool interrupt_requested();

/// One line on a terminal that is rewritten while tokens are read; nothing elsewhere.
class ProgressLine {
 public:
  ProgressLine(std::string what, double total) : what_(std::move(what)), total_(total) {}
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  /// Names the current activity.
  void name(std::string what) { what_ = std::move(what); }
  /// Throws Interrupted where the user asked for it.
  void operator()(double done);

 private:
  using Clock = std::chrono::steady_clock;
  std::string what_;
  double total_;
  bool shown_ = false;
  Clock::time_point start_ = Clock::now(), last_ = start_;
};

}  // namespace moba::app
