#pragma once

#include <cstdint>
#include <span>

#include "moba/attention.h"

namespace moba::llm {

/// Returns the work of the attention of one layer and head that reads a sequence of `tokens` tokens, in pairs
/// of a query and a key that it attends to. A score of the gate counts half a pair, whose product is half of
/// that pair's work.
double attention_work(const Routing& routing, std::int64_t tokens);

/// Returns how many times less work layers of these routings have than as many full ones.
double speed_up(std::span<const Routing> layers, std::int64_t tokens);

}  // namespace moba::llm
