#include "llm/eval/prompt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

namespace moba::llm::eval {
namespace {

TEST(UnitsThatFit, FillsTheLimit) {
  for (const std::int64_t unit_tokens : {1, 3, 17}) {
    for (const std::int64_t max_tokens : {100, 1000, 131072}) {
      const std::int64_t units =
          units_that_fit(max_tokens, [&](std::int64_t n) { return 40 + n * unit_tokens; });
      const std::int64_t tokens = 40 + units * unit_tokens;
      EXPECT_LE(tokens, max_tokens);
      EXPECT_GT(tokens, max_tokens - std::max(max_tokens / 256 + 1, unit_tokens));
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
