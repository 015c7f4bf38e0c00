#include "llm/calibrate/attention_work.h"

#include <algorithm>

namespace moba::llm {

double attention_work(const Routing& routing, std::int64_t tokens) {
  constexpr double kScore = 0.5;
  double work = 0;
  for (std::int64_t position = 0; position < tokens; ++position) {
    const std::int64_t before = position / routing.block_size;  // complete blocks
    const std::int64_t selected = std::min(before, routing.top_k - 1);
    work += static_cast<double>(position % routing.block_size + 1 + selected * routing.block_size);
    if (selected < before) work += kScore * static_cast<double>(before);
  }
  return work;
}

double speed_up(std::span<const Routing> layers, std::int64_t tokens) {
  double work = 0;
  for (const Routing& routing : layers) work += attention_work(routing, tokens);
  return static_cast<double>(layers.size()) * attention_work(Routing::full(), tokens) / work;
}

}  // namespace moba::llm
