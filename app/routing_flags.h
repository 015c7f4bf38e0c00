#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "llm/config.h"
#include "moba/attention.h"

// The flags of MoBA's blocks, which every subcommand shares that runs or trains a model.
namespace moba::app {

/// Before they are checked; unset where a default applies.
struct RoutingFlags {
  std::optional<std::int64_t> block_size, top_blocks, sink;
  std::optional<std::string> full_layers;
};

/// The defaults as --help names them.
struct RoutingDefaults {
  const char *block_size, *top_blocks, *sink, *full_layers;
};

/// Adds --moba-chunk-size, --moba-topk, --moba-sink and --moba-full-layers.
void add_routing_flags(CLI::App& command, RoutingFlags& flags, const RoutingDefaults& defaults);

/// Overwrites the defaults in `routing` and `full_layers` by the flags that are set. Throws UsageError,
/// naming the flag, for values out of range.
void read_routing(const RoutingFlags& flags, Routing& routing, std::vector<llm::LayerRange>& full_layers);

}  // namespace moba::app
