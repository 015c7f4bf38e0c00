#include "app/routing_flags.h"

#include <fmt/format.h>

#include <algorithm>

#include "llm/error.h"

namespace moba::app {

void add_routing_flags(FlagTable& flags, Routing& routing, const char* default_text,
                       const Flag::Condition& is_sparse) {
  flags.number("--moba-chunk-size", routing.block_size, {1, kMaxTokens}, "Block size in tokens")
      .default_text(default_text)
      .json(is_sparse);
  flags
      .number("--moba-topk", routing.top_k, {1, kMaxTokens},
              "Blocks that a query attends to, its own included")
      .default_text(default_text)
      .json(is_sparse);
  flags
      .number("--moba-sink", routing.sink_blocks, {0, kMaxTokens},
              "Attention sinks: first blocks that every query selects, counted in --moba-topk")
      .default_text(default_text)
      .json(is_sparse);
}

void add_full_layers_flag(FlagTable& flags, std::vector<llm::LayerRange>& full_layers,
                          const char* default_text, const Flag::Condition& is_sparse) {
  flags.layers("--moba-full-layers", full_layers, "Layers with full attention, such as 0,27-29")
      .default_text(default_text)
      .json(is_sparse);
}

void limit_sink(const FlagTable& flags, Routing& routing) {
  const std::int64_t max_sinks = routing.top_k - 1;
  if (flags.given("--moba-sink") && routing.sink_blocks > max_sinks) {
    throw llm::UsageError(fmt::format("--moba-sink: expected 0 to {}, one less than --moba-topk {}, got {}",
                                      max_sinks, routing.top_k, routing.sink_blocks));
  }
  routing.sink_blocks = std::min(routing.sink_blocks, max_sinks);
}

}  // namespace moba::app
