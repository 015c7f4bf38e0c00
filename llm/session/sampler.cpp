#include "llm/session/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace moba::llm {
namespace {

struct Candidate {
  std::int32_t id;
  double logit;
};

bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

/// The likeliest token; of equals the first.
std::int32_t argmax(std::span<const float> logits) {
  std::size_t best = 0;
  float max = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > max) {  // false for a NaN
      best = i;
      max = logits[i];
    }
  }
  return static_cast<std::int32_t>(best);
}

std::vector<Candidate> candidates_of(std::span<const float> logits) {
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double logit = std::isnan(logits[i]) ? -std::numeric_limits<double>::infinity() : logits[i];
    candidates.push_back({static_cast<std::int32_t>(i), logit});
  }
  return candidates;
}

void keep_top_k(std::vector<Candidate>& candidates, std::int64_t k) {
  const auto size = static_cast<std::int64_t>(candidates.size());
  if (k == 0 || k > size) k = size;
  std::partial_sort(candidates.begin(), candidates.begin() + k, candidates.end(), likelier);
  candidates.resize(static_cast<std::size_t>(k));
}

/// exp(logit - best) / temperature: probabilities up to a common factor. Sorted input, so the first is 1.
std::vector<double> weights_of(const std::vector<Candidate>& candidates, double temperature) {
  std::vector<double> weights;
  weights.reserve(candidates.size());
  for (const Candidate& c : candidates) {
    const bool best = c.logit == candidates.front().logit;  // infinities included
    weights.push_back(best ? 1.0 : std::exp((c.logit - candidates.front().logit) / temperature));
  }
  return weights;
}

double sum_of(const std::vector<double>& weights) {
  double sum = 0;
  for (double weight : weights) sum += weight;
  return sum;
}

void keep_top_p(std::vector<Candidate>& candidates, double p) {
  const std::vector<double> weights = weights_of(candidates, 1);
  const double enough = p * sum_of(weights);
  double reached = 0;
  std::size_t kept = 0;
  while (kept < weights.size() && (kept == 0 || reached < enough)) reached += weights[kept++];
  candidates.resize(kept);
}

void keep_min_p(std::vector<Candidate>& candidates, double p) {
  const std::vector<double> weights = weights_of(candidates, 1);
  const auto first_too_small =
      std::find_if(weights.begin(), weights.end(), [&](double weight) { return weight < p; });
  candidates.resize(static_cast<std::size_t>(first_too_small - weights.begin()));
}

/// [0, 1) from the top 53 bits: std::uniform_real_distribution differs between standard libraries.
double uniform(std::mt19937_64& random) {
  return static_cast<double>(random() >> 11) * 0x1p-53;
}

}  // namespace

std::int32_t Sampler::operator()(std::span<const float> logits) {
  if (sampling_.logit_bias.empty()) return sample(logits);
  std::vector<float> biased(logits.begin(), logits.end());
  for (const auto& [token, bias] : sampling_.logit_bias) {
    if (token >= 0 && static_cast<std::size_t>(token) < biased.size())
      biased[static_cast<std::size_t>(token)] += bias;
  }
  return sample(biased);
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  if (sampling_.temperature == 0) return argmax(logits);

  std::vector<Candidate> candidates = candidates_of(logits);
  keep_top_k(candidates, sampling_.top_k);
  if (sampling_.top_p < 1) keep_top_p(candidates, sampling_.top_p);
  if (sampling_.min_p > 0) keep_min_p(candidates, sampling_.min_p);

  const std::vector<double> weights = weights_of(candidates, sampling_.temperature);
  double left = uniform(random_) * sum_of(weights);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    left -= weights[i];
    if (left < 0) return candidates[i].id;
  }
  return candidates.back().id;
}

}  // namespace moba::llm
