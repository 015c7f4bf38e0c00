#include "app/logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace moba::app {

TokenLogprobs logprobs_of(std::int32_t token, std::span<const float> logits, std::int64_t count) {
  const auto logit = [&](std::int32_t id) {
    const float value = logits[static_cast<std::size_t>(id)];
    return std::isnan(value) ? -std::numeric_limits<float>::infinity() : value;
  };
  const std::int64_t sorted = std::clamp<std::int64_t>(count, 1, std::ssize(logits));
  std::vector<std::int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::partial_sort(ids.begin(), ids.begin() + sorted, ids.end(),
                    [&](auto a, auto b) { return logit(a) != logit(b) ? logit(a) > logit(b) : a < b; });
  const double largest = logit(ids.front());
  double sum = 0;
  for (const std::int32_t id : ids) sum += std::exp(logit(id) - largest);
  const auto entry = [&](std::int32_t id) { return TokenLogprob{id, logit(id) - largest - std::log(sum)}; };
  TokenLogprobs result{entry(token), {}};
  for (std::int64_t i = 0; i < std::min(count, sorted); ++i)
    result.top.push_back(entry(ids[static_cast<std::size_t>(i)]));
  return result;
}

}  // namespace moba::app
