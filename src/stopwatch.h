#pragma once

#include <chrono>

namespace moba {

/// Measures the seconds since its construction.
class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

/// Adds the seconds of its scope to `total`.
class ScopedTimer {
 public:
  explicit ScopedTimer(double& total) : total_(total) {}
  ~ScopedTimer() { total_ += stopwatch_.seconds(); }
  ScopedTimer(const ScopedTimer&) = delete;
  ScopedTimer& operator=(const ScopedTimer&) = delete;

 private:
  double& total_;
  Stopwatch stopwatch_;
};

/// Calls `work` and returns the seconds that it took.
template <typename Work>
double seconds_of(Work&& work) {
  const Stopwatch stopwatch;
  work();
  return stopwatch.seconds();
}

}  // namespace moba
