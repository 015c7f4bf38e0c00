#pragma once

#include <vector>

namespace moba::app {

/// One axis of a plot: values from `low` to `high` lie between two places of the picture.
struct Axis {
  double low, high, begin, end;

  double at(double value) const { return begin + (value - low) / (high - low) * (end - begin); }
  /// Some six round values.
  std::vector<double> ticks() const;
};

}  // namespace moba::app
