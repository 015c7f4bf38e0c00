#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace moba::app {

struct TokenLogprob {
  std::int32_t id;
  double logprob;
};

/// The log-probability of a token, and the likeliest tokens in its place.
struct TokenLogprobs {
  TokenLogprob token;
  /// Likeliest first, of equal ones the lower id.
  std::vector<TokenLogprob> top;
};

/// Returns the log-probabilities that `logits` give `token` and the `count` likeliest tokens, before bias,
/// temperature and filters. A NaN counts as -inf.
TokenLogprobs logprobs_of(std::int32_t token, std::span<const float> logits, std::int64_t count);

}  // namespace moba::app
