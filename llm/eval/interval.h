#pragma once

#include <cstdint>
#include <vector>

namespace moba::llm::eval {

/// The 95% confidence interval of a value.
struct Interval {
  double low, high;
};

/// Returns the interval of a proportion: `successes` of `tried` (Wilson's score interval). Successes may be
/// fractional, sums of scores between 0 and 1; these vary less than 0 and 1 do, so the interval is then too
/// wide.
Interval wilson(double successes, std::int64_t tried);

/// A sum over tokens that belong together, such as the losses of one sequence.
struct Portion {
  double sum = 0;
  std::int64_t count = 0;

  void add(double value) {
    sum += value;
    ++count;
  }
};

/// Returns the sum of all portions over their count; NaN without portions.
double mean(const std::vector<Portion>& portions);

/// Returns the bootstrap interval of the mean: percentiles of 1000 resamples of the portions, the same in
/// every run. Needs two portions.
Interval bootstrap(const std::vector<Portion>& portions);

}  // namespace moba::llm::eval
