#pragma once

#include <cstdint>

#include "app/bench/row.h"
#include "moba/tensor.h"

namespace moba::bench {

/// The tensor that is filled.
enum class Role : std::uint8_t { query, key, value, d_out };

/// The parameters of the data.
struct Recipe {
  Pattern pattern = Pattern::independent;
  std::uint64_t seed = 0;
  /// Query heads of a kv head: they look for the same.
  std::int64_t group = 1;
  /// Tokens from the start that every query of the sink pattern looks for.
  std::int64_t sink_tokens = 0;
};

/// Fills `tensor` [tokens, heads, head_dim], contiguous, whose first token is number `first_token` of its
/// sequence. Noise of mean 0 and variance 1, nearly Gaussian; keys and queries that share an aim have a
/// common centre added. Every number follows from the recipe and its place alone.
void fill(const Tensor& tensor, Role role, const Recipe& recipe, std::int64_t first_token,
          const Parallel& parallel);

}  // namespace moba::bench
