#include "llm/engine/prompt_weights.h"

#include <algorithm>

namespace moba::llm {

PromptWeights::PromptWeights(std::int64_t heads, std::int64_t range, std::int64_t prompt_tokens)
    : heads_(heads),
      range_(range),
      prompt_tokens_(prompt_tokens),
      sums_(static_cast<std::size_t>((prompt_tokens + range - 1) / range)),
      average_(sums_.size()) {
  of_layer_.resize(sums_.size() * static_cast<std::size_t>(heads));
}

void PromptWeights::clear() {
  std::fill(sums_.begin(), sums_.end(), 0.0);
  layers_ = 0;
}

KeyWeights PromptWeights::layer() {
  return {.data = of_layer_.data(), .range = range_, .keys = prompt_tokens_};
}

void PromptWeights::add_layer() {
  ++layers_;
  for (auto row = of_layer_.begin(); row != of_layer_.end();)
    for (double& sum : sums_) sum += *row++;
}

std::span<const float> PromptWeights::average() {
  const double rows = static_cast<double>(std::max<std::int64_t>(layers_, 1) * heads_);
  std::transform(sums_.begin(), sums_.end(), average_.begin(),
                 [&](double sum) { return static_cast<float>(sum / rows); });
  return average_;
}

}  // namespace moba::llm
