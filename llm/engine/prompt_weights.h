#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moba/attention.h"

namespace moba::llm {

/// Attention weights of one query on ranges of the prompt, averaged over layers and heads.
class PromptWeights {
 public:
  /// `range`: tokens that share a weight.
  PromptWeights(std::int64_t heads, std::int64_t range, std::int64_t prompt_tokens);

  /// Begins the average of another query.
  void clear();
  /// Returns the destination of the weights of the next layer.
  KeyWeights layer();
  /// Adds what was written there.
  void add_layer();
  /// Returns the averages [ceil(prompt / range)].
  std::span<const float> average();

 private:
  std::int64_t heads_, range_, prompt_tokens_, layers_ = 0;
  std::vector<float> of_layer_;  // [heads, ranges]
  std::vector<double> sums_;
  std::vector<float> average_;
};

}  // namespace moba::llm
