#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "oracle.h"

/// Selections that the caller makes, and gradients over them by their definition.
namespace moba::test {

/// A selection with its memory. Elements beyond the width hold a block that no query has.
struct Selected {
  std::int64_t heads = 1, tokens = 0, width = 0, stride = 0;
  std::vector<std::int32_t> blocks{};

  Selected(std::int64_t head_count, std::int64_t token_count, std::int64_t row_width, std::int64_t gap)
      : heads(head_count),
        tokens(token_count),
        width(row_width),
        stride(row_width + gap),
        blocks(static_cast<std::size_t>(head_count * token_count * stride), 1 << 30) {
    for (std::int64_t i = 0; i < heads * tokens; ++i) std::fill_n(blocks.begin() + i * stride, width, -1);
  }
  std::int32_t* row(std::int64_t head, std::int64_t token) {
    return blocks.data() + (head * tokens + token) * stride;
  }
  const std::int32_t* row(std::int64_t head, std::int64_t token) const {
    return blocks.data() + (head * tokens + token) * stride;
  }
  Selection view() const {
    return {.blocks = blocks.data(), .heads = heads, .width = width, .stride = stride};
  }
};

/// Calls visit(head, packed token, own block, blocks that it may see) for every row of `heads` heads.
template <typename Visit>
void for_each_row(const Case& c, std::int64_t heads, Visit&& visit) {
  for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_q.size(); ++s) {
    const std::int64_t q0 = c.sequences.cu_seqlens_q[s], q1 = c.sequences.cu_seqlens_q[s + 1];
    const std::int64_t keys = c.sequences.cu_seqlens_k[s + 1] - c.sequences.cu_seqlens_k[s];
    for (std::int64_t token = q0; token < q1; ++token) {
      const std::int64_t position = token - q1 + keys;
      const std::int64_t own = c.routing.causal && position >= 0 ? position / c.routing.block_size : -1;
      const std::int64_t seen = c.routing.causal ? own + 1
                                : keys == 0      ? 0
                                                 : (keys - 1) / c.routing.block_size + 1;
      for (std::int64_t head = 0; head < heads; ++head) visit(head, token, own, seen);
    }
  }
}

/// Selects a random number of random blocks for every row; an own block among them.
Selected random_selection(const Case& c, std::uint64_t seed);

/// Enters the selection in a result, for the oracle.
void enter(const Selected& selected, const Case& c, Result& result);

/// Gradients by their definition, in double: [tokens, heads, D] each.
struct TrueGradients {
  std::vector<double> dq, dk, dv;
};
TrueGradients true_gradients(const Case& c, const Result& result, const Array& d_out);

/// Fails the test where an element differs by more than `tolerance` times one plus its magnitude.
void check_near(const Case& c, const char* name, const Array& found, const std::vector<double>& expected,
                double tolerance);

/// Returns a gradient of the output of a case.
Array gradient_for(const Case& c);

}  // namespace moba::test
