#include "app/routing_flags.h"

#include <fmt/format.h>

#include <algorithm>

#include "app/flags.h"
#include "llm/error.h"

namespace moba::app {

void add_routing_flags(CLI::App& command, RoutingFlags& flags, const RoutingDefaults& defaults) {
  const std::string group = "Attention";
  add_number(command, "--moba-chunk-size", flags.block_size,
             fmt::format("Tokens in a block [{}]", defaults.block_size))
      ->group(group);
  add_number(command, "--moba-topk", flags.top_blocks,
             fmt::format("Blocks a token attends to, its own included [{}]", defaults.top_blocks))
      ->group(group);
  add_number(command, "--moba-sink", flags.sink,
             fmt::format("First blocks that are always selected, counted in top-k [{}]", defaults.sink))
      ->group(group);
  command
      .add_option("--moba-full-layers", flags.full_layers,
                  fmt::format("Layers that stay full, such as 0,27-29 [{}]", defaults.full_layers))
      ->group(group);
}

void read_routing(const RoutingFlags& flags, Routing& routing, std::vector<llm::LayerRange>& full_layers) {
  routing.block_size = in_range("--moba-chunk-size", flags.block_size, 1, kMaxTokens, routing.block_size);
  routing.top_k = in_range("--moba-topk", flags.top_blocks, 1, kMaxTokens, routing.top_k);
  const std::int64_t max_sinks = routing.top_k - 1;
  if (flags.sink && (*flags.sink < 0 || *flags.sink > max_sinks)) {
    throw llm::UsageError(fmt::format("--moba-sink: expected 0 to {}, one less than --moba-topk {}, got {}",
                                      max_sinks, routing.top_k, *flags.sink));
  }
  routing.sink_blocks = flags.sink.value_or(std::min(routing.sink_blocks, max_sinks));
  if (flags.full_layers) full_layers = layer_ranges("--moba-full-layers", *flags.full_layers);
}

}  // namespace moba::app
