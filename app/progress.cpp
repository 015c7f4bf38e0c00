#include "app/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>

namespace moba::app {
namespace {

volatile std::sig_atomic_t interrupted = 0;

std::string duration_text(double seconds) {
  const auto whole = static_cast<std::int64_t>(std::min(seconds, 1e15));
  if (whole < 120) return fmt::format("{} s", whole);
  return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
}

}  // namespace

void note_interrupts() {
  std::signal(SIGINT, [](int number) {
    interrupted = 1;
    std::signal(number, SIG_DFL);
  });
}

bool interrupt_requested() {
  return interrupted != 0;
}

ProgressLine::~ProgressLine() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void ProgressLine::operator()(double done) {
  if (interrupt_requested()) throw Interrupted();
  const Clock::time_point time = Clock::now();
  static const bool terminal = isatty(STDERR_FILENO) == 1;
  if (!terminal || time - last_ < std::chrono::milliseconds(100)) return;
  last_ = time;
  shown_ = true;
  const double speed = done / std::chrono::duration<double>(time - start_).count();
  const std::string line =
      fmt::format("\r{} {:.0f} of {:.0f} tokens, {:.0f} tokens/s, {} left\033[K", what_, done, total_, speed,
                  duration_text((total_ - done) / std::max(speed, 1e-9)));
  std::fputs(line.c_str(), stderr);
}

}  // namespace moba::app
