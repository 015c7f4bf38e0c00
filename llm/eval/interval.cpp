#include "llm/eval/interval.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "llm/eval/random.h"

namespace moba::llm::eval {

Interval wilson(double successes, std::int64_t tried) {
  constexpr double kZ = 1.959963984540054;  // of 95%
  const auto n = static_cast<double>(tried);
  if (tried == 0) return {0, 1};
  const double p = successes / n, denominator = 1 + kZ * kZ / n;
  const double centre = (p + kZ * kZ / (2 * n)) / denominator;
  const double half = kZ / denominator * std::sqrt(p * (1 - p) / n + kZ * kZ / (4 * n * n));
  return {std::max(0.0, centre - half), std::min(1.0, centre + half)};
}

double mean(const std::vector<Portion>& portions) {
  Portion all;
  for (const Portion& portion : portions) {
    all.sum += portion.sum;
    all.count += portion.count;
  }
  return all.count > 0 ? all.sum / static_cast<double>(all.count) : std::numeric_limits<double>::quiet_NaN();
}

Interval bootstrap(const std::vector<Portion>& portions) {
  constexpr std::size_t kDraws = 1000;
  Random random{1};
  std::vector<double> means;
  std::vector<Portion> drawn(portions.size());
  while (means.size() < kDraws) {
    for (Portion& portion : drawn) portion = random.one_of(portions);
    means.push_back(mean(drawn));
  }
  std::sort(means.begin(), means.end());
  return {means[kDraws * 25 / 1000], means[kDraws * 975 / 1000 - 1]};
}

}  // namespace moba::llm::eval
