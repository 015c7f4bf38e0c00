#include "llm/eval/prompt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

namespace moba::llm::eval {
namespace {

TEST(UnitsThatFit, FillsTheLimit) {
  for (const std::int64_t tokens_a_unit : {1, 3, 17}) {
    for (const std::int64_t most : {100, 1000, 131072}) {
      const std::int64_t units = units_that_fit(most, [&](std::int64_t n) { return 40 + n * tokens_a_unit; });
      const std::int64_t tokens = 40 + units * tokens_a_unit;
      EXPECT_LE(tokens, most);
      EXPECT_GT(tokens, most - std::max(most / 256 + 1, tokens_a_unit));
    }
  }
}

TEST(UnitsThatFit, FitsUnevenUnits) {
  const auto tokens = [](std::int64_t n) { return n < 50 ? n : 50 + 90 * (n - 50); };
  const std::int64_t units = units_that_fit(1000, tokens);
  EXPECT_EQ(units, 60);
}

TEST(UnitsThatFit, ReturnsMinusOneIfNoneFits) {
  EXPECT_EQ(units_that_fit(39, [](std::int64_t n) { return 40 + n; }), -1);
}

TEST(UnitsThatFit, TerminatesWhereTokensStopGrowing) {
  const std::int64_t units =
      units_that_fit(1000, [](std::int64_t n) { return std::min<std::int64_t>(n, 300); });
  EXPECT_GE(units, 300);
}

TEST(Filled, ReplacesEveryPlaceholder) {
  EXPECT_EQ(filled("{key}: {value}, {key} {other}", {{"key", "{value}"}, {"value", "7"}}), "7: 7, 7 {other}");
}

}  // namespace
}  // namespace moba::llm::eval
