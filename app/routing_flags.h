#pragma once

#include <vector>

#include "app/flags.h"
#include "llm/config.h"
#include "moba/attention.h"

// The flags of MoBA's blocks, for every subcommand that runs or trains a model.
namespace moba::app {

/// Adds --moba-chunk-size, --moba-topk and --moba-sink, with `routing` as their default. `default_text`
/// describes the defaults, "{}" being the value. They are in the JSON where `is_sparse`.
void add_routing_flags(FlagTable& flags, Routing& routing, const char* default_text = "{}",
                       const Flag::Condition& is_sparse = {});
void add_full_layers_flag(FlagTable& flags, std::vector<llm::LayerRange>& full_layers,
                          const char* default_text = "{}", const Flag::Condition& is_sparse = {});

/// Lowers a default of --moba-sink below --moba-topk. Throws UsageError if the flag itself is not below it.
void limit_sink(const FlagTable& flags, Routing& routing);

}  // namespace moba::app
