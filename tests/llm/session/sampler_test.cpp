#include "llm/session/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

namespace moba::llm {
namespace {

constexpr int kDraws = 20000;

/// Returns the share of draws of each token.
std::map<std::int32_t, double> shares(const Sampling& sampling, const std::vector<float>& logits) {
  Sampler sampler(sampling);
  std::map<std::int32_t, double> shares;
  for (int i = 0; i < kDraws; ++i) shares[sampler(logits)] += 1.0 / kDraws;
  return shares;
}

/// Returns logits of given probabilities.
std::vector<float> logits_of(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  logits.reserve(probabilities.size());
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

const Sampling kEverything{.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 7};

TEST(Sampler, GreedyTakesTheFirstMaximum) {
  Sampler greedy({});
  EXPECT_EQ(greedy(std::vector<float>{0, 3, 1}), 1);
  EXPECT_EQ(greedy(std::vector<float>{0, 2, 2}), 1);
}

TEST(Sampler, NanLogitsAreNeverSampled) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Sampler({})(std::vector<float>{nan, -5, nan}), 1);
  EXPECT_EQ(shares(kEverything, {nan, -5, nan}).at(1), shares(kEverything, {0}).at(0));
  EXPECT_EQ(Sampler({})(std::vector<float>{nan, nan}), 0);
}

TEST(Sampler, HandlesInfiniteLogits) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(shares(kEverything, {1, infinity, 2}).count(0), 0U);
  EXPECT_EQ(shares(kEverything, {-infinity, -infinity}).size(), 2U);
}

TEST(Sampler, DrawsInProportionToProbabilities) {
  const auto drawn = shares(kEverything, logits_of({0.5, 0.3, 0.2}));
  EXPECT_NEAR(drawn.at(0), 0.5, 0.02);
  EXPECT_NEAR(drawn.at(1), 0.3, 0.02);
  EXPECT_NEAR(drawn.at(2), 0.2, 0.02);
}

TEST(Sampler, LowTemperatureSharpens) {
  Sampling cold = kEverything;
  cold.temperature = 0.5;  // squares the probabilities
  EXPECT_NEAR(shares(cold, logits_of({0.8, 0.2})).at(0), 0.64 / 0.68, 0.02);
}

TEST(Sampler, TopKKeepsTheLikeliest) {
  Sampling sampling = kEverything;
  sampling.top_k = 2;
  const auto drawn = shares(sampling, logits_of({0.1, 0.4, 0.2, 0.3}));
  EXPECT_EQ(drawn.size(), 2U);
  EXPECT_NEAR(drawn.at(1), 4.0 / 7, 0.02);
  EXPECT_NEAR(drawn.at(3), 3.0 / 7, 0.02);
}

TEST(Sampler, TopPKeepsTheFewestThatReachIt) {
  Sampling sampling = kEverything;
  sampling.top_p = 0.6;
  EXPECT_EQ(shares(sampling, logits_of({0.5, 0.3, 0.2})).size(), 2U);
  sampling.top_p = 0;
  EXPECT_EQ(shares(sampling, logits_of({0.5, 0.3, 0.2})).size(), 1U);
}

TEST(Sampler, MinPIsRelativeToTheLikeliest) {
  Sampling sampling = kEverything;
  sampling.min_p = 0.5;
  EXPECT_EQ(shares(sampling, logits_of({0.4, 0.25, 0.15, 0.2})).size(), 2U);
}

TEST(Sampler, FiltersApplyBeforeTheTemperature) {
  Sampling hot = kEverything;
  hot.temperature = 1000;
  hot.top_p = 0.6;
  EXPECT_EQ(shares(hot, logits_of({0.5, 0.3, 0.2})).size(), 2U);
}

TEST(Sampler, LogitBiasIsAddedFirst) {
  Sampling sampling;
  sampling.logit_bias = {{0, 2.5F}, {2, -100}, {7, 1}, {-1, 1}};  // the last two have no logit
  EXPECT_EQ(Sampler(sampling)(std::vector<float>{1, 3, 9}), 0);
  Sampling drawn = kEverything;
  drawn.logit_bias = {{1, -std::numeric_limits<float>::infinity()}};
  EXPECT_EQ(shares(drawn, logits_of({0.5, 0.3, 0.2})).count(1), 0U);
}

TEST(Sampler, SeedsAreReproducible) {
  const std::vector<float> flat(1000, 0.0f);
  const auto draw = [&](std::uint64_t seed) {
    Sampling sampling = kEverything;
    sampling.seed = seed;
    Sampler sampler(sampling);
    std::vector<std::int32_t> ids;
    ids.reserve(20);
    for (int i = 0; i < 20; ++i) ids.push_back(sampler(flat));
    return ids;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

}  // namespace
}  // namespace moba::llm
