#pragma once

#include <cstddef>
#include <vector>

namespace moba::llm {

/// One way for a layer to attend: its work, and the divergence that it alone causes.
struct LayerOption {
  double work = 0, divergence = 0;
};

/// A choice of an option for every layer.
struct FrontierPoint {
  std::vector<std::size_t> choice;  // [layers]
  /// Sums over the layers: the divergence as if the layers' effects added up.
  double work = 0, divergence = 0;
};

/// Returns choices from that of the most work on, each with less work than the one before: greedily, where a
/// step lowers the work the most for the divergence that it adds. No other choice has both less work and less
/// divergence than one of these. `options` [layers][options]; every layer has an option.
std::vector<FrontierPoint> frontier(const std::vector<std::vector<LayerOption>>& options);

}  // namespace moba::llm
