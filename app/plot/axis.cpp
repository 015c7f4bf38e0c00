#include "app/plot/axis.h"

#include <cmath>

namespace moba::app {
namespace {

/// 1, 2 or 5 times a power of ten: about six of them fit into `range`.
double tick_step(double range) {
  const double power = std::pow(10.0, std::floor(std::log10(range / 6)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (range / (factor * power) <= 7) return factor * power;
  }
  return 10 * power;
}

}  // namespace

std::vector<double> Axis::ticks() const {
  std::vector<double> values;
  const double step = tick_step(high - low);
  const auto first = std::llround(std::ceil(low / step)), last = std::llround(std::floor(high / step));
  for (long long i = first; i <= last; ++i) values.push_back(static_cast<double>(i) * step);
  return values;
}

}  // namespace moba::app
