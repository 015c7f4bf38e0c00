#pragma once

#include <cstdint>

#include "backend.h"

/// What the workers of the backward pass share.
namespace moba::cpu {

/// f32 sums [tokens, heads, D], heads counted from `head0`: an output itself where that is f32, else scratch.
struct Sums {
  float* data = nullptr;
  std::int64_t token_stride = 0, head_stride = 0, head0 = 0;

  float* row(std::int64_t token, std::int64_t head) const {
    return data + token * token_stride + (head - head0) * head_stride;
  }
};

/// Of one row: its log-sum-exp in units of log2, +inf where the row sees nothing, and <d_out, out>.
struct RowStats {
  float lse, delta;
};

struct Gradient {
  const Problem& problem;
  const Plan& plan;
  const Backward& backward;
  Group group;
  Sums dq, dk, dv;
  RowStats* stats;  // [query heads of the group, tokens]

  RowStats& stats_of(std::int64_t q_head, std::int64_t token) const {
    return stats[(q_head - group.head0 * problem.group) * problem.tokens + token];
  }
};

/// The queries of one range against the chunks of keys whose index is `part` modulo `parts`.
struct Cell {
  const Range* range = nullptr;
  std::int64_t part = 0, parts = 1;
  std::int64_t first_key = 0;  // of the sequence, among the packed keys
  std::int64_t work = 0;       // rows x keys, about
};

/// How the keys of a sequence are cut into chunks that never cross blocks.
struct Chunking {
  std::int64_t of_block = 1, size = 1;  // chunks of a block, keys of a chunk
};

}  // namespace moba::cpu
