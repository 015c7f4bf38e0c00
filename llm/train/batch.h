#pragma once

#include <cstdint>
#include <vector>

namespace moba::llm::train {

/// Sequences laid end to end, none of which sees another.
struct Batch {
  std::vector<std::int32_t> tokens;
  /// What follows each token; -1 where that does not count for the loss.
  std::vector<std::int32_t> targets;
  /// Where sequences begin, and where the last ends.
  std::vector<std::int32_t> cu_seqlens{0};

  std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
};

}  // namespace moba::llm::train
