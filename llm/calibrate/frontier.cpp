#include "llm/calibrate/frontier.h"

#include <algorithm>

namespace moba::llm {
namespace {

/// A step of one layer to an option of less work.
struct Step {
  std::size_t layer, option;
  double saved, added;
  double price() const { return added / saved; }
};

/// Returns the first option of a layer, the best of the most work or better, and appends the steps along the
/// lower convex hull of its options, of rising price.
std::size_t add_steps(std::size_t layer, const std::vector<LayerOption>& options, std::vector<Step>& steps) {
  const auto is_worse = [&](std::size_t a, std::size_t b) {
    return std::pair(options[a].divergence, options[a].work) >
           std::pair(options[b].divergence, options[b].work);
  };
  std::size_t first = 0;
  for (std::size_t i = 1; i < options.size(); ++i)
    if (is_worse(first, i)) first = i;
  for (std::size_t at = first;;) {
    const Step none{layer, at, 0, 0};
    Step best = none;
    for (std::size_t i = 0; i < options.size(); ++i) {
      const Step step{layer, i, options[at].work - options[i].work,
                      options[i].divergence - options[at].divergence};
      if (step.saved <= 0) continue;
      if (best.saved == 0 || std::pair(step.price(), -step.saved) < std::pair(best.price(), -best.saved))
        best = step;
    }
    if (best.saved == 0) return first;
    steps.push_back(best);
    at = best.option;
  }
}

}  // namespace

std::vector<FrontierPoint> frontier(const std::vector<std::vector<LayerOption>>& options) {
  FrontierPoint point;
  std::vector<Step> steps;
  for (std::size_t layer = 0; layer < options.size(); ++layer) {
    point.choice.push_back(add_steps(layer, options[layer], steps));
    point.work += options[layer][point.choice.back()].work;
    point.divergence += options[layer][point.choice.back()].divergence;
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.price() < b.price(); });
  std::vector<FrontierPoint> points{point};
  for (const Step& step : steps) {
    point.choice[step.layer] = step.option;
    point.work -= step.saved;
    point.divergence += step.added;
    points.push_back(point);
  }
  return points;
}

}  // namespace moba::llm
