#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace moba::llm {

struct TokenBias {
  std::int32_t token;
  float bias;
};

/// The settings of sampling. The filters are applied in this order, before the temperature, as llama.cpp
/// does.
struct Sampling {
  /// 0: greedy, always the likeliest token.
  double temperature = 0;
  /// Keep this many of the likeliest tokens; 0: all.
  std::int64_t top_k = 40;
  /// Keep the likeliest tokens that together reach this probability; 1: all.
  double top_p = 0.95;
  /// Keep tokens at least this probable relative to the likeliest; 0: all.
  double min_p = 0.05;
  std::uint64_t seed = 0;
  /// Added to the logits of these tokens before all else.
  std::vector<TokenBias> logit_bias{};
};

/// Draws tokens; the same seed and logits give the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const Sampling& sampling) : sampling_(sampling), random_(sampling.seed) {}

  /// Returns the next token's id. Of equal logits the lower id comes first; a NaN counts as -inf. A bias for
  /// an id without a logit is ignored.
  std::int32_t operator()(std::span<const float> logits);

 private:
  std::int32_t sample(std::span<const float> logits);

  Sampling sampling_;
  std::mt19937_64 random_;
};

}  // namespace moba::llm
