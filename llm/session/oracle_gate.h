#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moba/attention.h"

namespace moba::llm {

/// The keys of one layer, and the best blocks that a gate could select from them: those with the most
/// attention mass under full attention. Computes all scores, so it is a measuring tool: it says what a
/// routing costs where the gate makes no mistake.
class OracleGate {
 public:
  /// Adds the keys of new tokens, [n, Hkv, D].
  void append(const Tensor& k);
  /// Drops all but the first `tokens`.
  void truncate(std::int64_t tokens);
  /// Returns `routing` with the blocks of the last tokens, whose queries are `q` [n, Hq, D]: the own one, the
  /// sinks, and those of the most mass. Valid until the next call.
  Routing select(const Tensor& q, const Routing& routing, const Parallel& parallel);

 private:
  std::int64_t kv_heads_ = 0, head_dim_ = 0, tokens_ = 0;
  std::vector<float> keys_;              // [tokens, Hkv, D]
  std::vector<std::int32_t> selection_;  // [Hq, n, width]
};

}  // namespace moba::llm
