#pragma once

#include <algorithm>
#include <cstdint>

namespace moba::llm {

/// Number of prompt tokens that a step reads, from the speed of the chunks before.
class ChunkSize {
 public:
  /// Fewer would hardly be faster: the weights are read once a chunk.
  static constexpr std::int64_t kMin = 16;

  /// Returns the tokens that take about `seconds`: at least kMin, at most twice as many as measured.
  std::int64_t within(double seconds) const {
    if (tokens_per_second_ == 0) return 4 * kMin;
    const double tokens = std::clamp(seconds * tokens_per_second_, 0.0, 1e9);
    return std::clamp(static_cast<std::int64_t>(tokens), kMin, std::max(kMin, 2 * measured_));
  }
  void measure(std::int64_t tokens, double seconds) {
    measured_ = tokens;
    tokens_per_second_ = static_cast<double>(tokens) / std::max(seconds, 1e-9);
  }

 private:
  std::int64_t measured_ = 0;
  double tokens_per_second_ = 0;
};

}  // namespace moba::llm
