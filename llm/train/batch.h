#pragma once

#include <cstdint>
#include <vector>

namespace moba::llm::train {

/// Packed sequences, which do not attend to one another.
struct Batch {
  std::vector<std::int32_t> tokens;
  /// The target of each token; -1 if it does not count for the loss.
  std::vector<std::int32_t> targets;
  /// Cumulative sequence lengths, from 0 to the number of tokens.
  std::vector<std::int32_t> cu_seqlens{0};

  std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
};

}  // namespace moba::llm::train
