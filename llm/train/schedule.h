#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moba::llm::train {

/// The learning rate over a run of `steps` steps: rises linearly over the first `warmup`, then falls to
/// `floor` * peak along half a cosine, or stays and falls linearly over the last `decay` (warm-up, stable,
/// decay), or stays.
struct LearningRate {
  enum class Kind : std::uint8_t { cosine, wsd, constant };
  Kind kind = Kind::cosine;
  double peak = 3e-4;
  double floor = 0.1;
  std::int64_t steps = 1, warmup = 0, decay = 0;

  /// Returns the rate at step `step`, counted from 0.
  double at(std::int64_t step) const;
};

enum class AttentionMode : std::uint8_t { full, moba };

/// The attention modes of a run: consecutive shares of its steps.
class AttentionSchedule {
 public:
  struct Part {
    AttentionMode attend;
    double share;
  };

  /// Throws UsageError for shares that are not positive or do not add up to 1.
  explicit AttentionSchedule(std::vector<Part> parts);
  /// Parses "moba:0.9,full:0.1"; UsageErrors name `flag`.
  static AttentionSchedule parse(const char* flag, const std::string& text);

  /// Returns the mode at step `step` of `steps`, counted from 0.
  AttentionMode at(std::int64_t step, std::int64_t steps) const;
  bool uses(AttentionMode attend) const;

 private:
  std::vector<Part> parts_;
};

}  // namespace moba::llm::train
