#pragma once

#include <cstdint>
#include <vector>

namespace moba::llm::eval {

/// The 95% confidence interval of a value.
struct Interval {
  double low, high;
};

/// The interval of a share: `successes` of `tried` (Wilson's score interval). Successes may be fractional,
/// means of values between 0 and 1; these vary less than yes and no, so the interval is then wider than it
/// need be.
Interval wilson(double successes, std::int64_t tried);

/// A sum over some tokens that belong together, such as the losses of one sequence.
struct Portion {
  double sum = 0;
  std::int64_t count = 0;

  void add(double value) {
    sum += value;
    ++count;
  }
};

/// Sum over count of all portions; NaN of none.
double mean(const std::vector<Portion>& portions);

/// The interval of the mean, were other portions of the same kind drawn: percentiles of 1000 draws with
/// replacement, the same in every run. Needs two portions.
Interval bootstrap(const std::vector<Portion>& portions);

}  // namespace moba::llm::eval
