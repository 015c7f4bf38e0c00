#include "llm/eval/interval.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace moba::llm::eval {
namespace {

// Worked out by hand from the formula of Brown, Cai and DasGupta; R's prop.test(correct = FALSE) gives the
// same.
TEST(Wilson, MatchesKnownIntervals) {
  const Interval none = wilson(0, 10), most = wilson(8, 10), all = wilson(20, 20);
  EXPECT_NEAR(none.low, 0, 1e-12);
  EXPECT_NEAR(none.high, 0.2775328, 1e-6);
  EXPECT_NEAR(most.low, 0.4901625, 1e-6);
  EXPECT_NEAR(most.high, 0.9433178, 1e-6);
  EXPECT_NEAR(all.low, 0.8388748, 1e-6);
  EXPECT_NEAR(all.high, 1, 1e-12);
}

TEST(Wilson, NoTrialsGiveTheWholeRange) {
  EXPECT_EQ(wilson(0, 0).low, 0);
  EXPECT_EQ(wilson(0, 0).high, 1);
}

TEST(Mean, IsOverTokensNotSequences) {
  EXPECT_DOUBLE_EQ(mean({{6, 2}, {3, 1}, {0, 3}}), 1.5);
  EXPECT_TRUE(std::isnan(mean({})));
}

TEST(Bootstrap, ContainsTheMeanAndIsReproducible) {
  std::vector<Portion> portions;
  portions.reserve(50);
  for (int i = 0; i < 50; ++i) portions.push_back({static_cast<double>(i % 7), 1});
  const Interval first = bootstrap(portions), again = bootstrap(portions);
  EXPECT_EQ(first.low, again.low);
  EXPECT_EQ(first.high, again.high);
  EXPECT_LT(first.low, mean(portions));
  EXPECT_GT(first.high, mean(portions));
  EXPECT_NEAR(first.high - first.low, 2 * 1.96 * 2.0 / std::sqrt(50.0), 0.25);  // their deviation is 2
}

TEST(Bootstrap, EqualPortionsGiveAnIntervalOfWidthZero) {
  const Interval interval = bootstrap({{4, 2}, {4, 2}, {4, 2}});
  EXPECT_EQ(interval.low, 2);
  EXPECT_EQ(interval.high, 2);
}

}  // namespace
}  // namespace moba::llm::eval
