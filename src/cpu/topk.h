#pragma once

#include <algorithm>
#include <cstdint>

#include "call.h"
#include "constants.h"

/// Candidate blocks of a row and its running top-k list; shared by the gate and by decoding.
namespace moba::cpu {

/// Blocks [first, last), of which a row must select `k` besides those that are forced.
struct Candidates {
  std::int64_t first = 0, last = 0, k = 0, own = -1;
  std::int64_t count = 0;  // selected so far
};

inline Candidates candidates_of(const Call& call, const SequenceView& s, std::int64_t query,
                                std::int64_t width) {
  const std::int64_t own = call.own_block(s, query);
  if (call.routing.causal) {
    const std::int64_t candidates = std::max<std::int64_t>(own, 0),
                       sinks = std::min(call.routing.sink_blocks, candidates);
    return {sinks, candidates, std::min(width, candidates) - sinks};
  }
  const std::int64_t candidates = call.blocks(s),
                     sinks = std::min({call.routing.sink_blocks, candidates, width});
  const bool forced = call.routing.own_block && own >= sinks && sinks < width;
  return {sinks, candidates, std::min(width, candidates) - sinks - (forced ? 1 : 0), forced ? own : -1};
}

/// The running top-k of a row, worst first; among equal scores the older block is the worse.
struct TopK {
  float* scores;
  std::int32_t* blocks;
  std::int64_t count, k;

  void push(float score, std::int32_t block) {
    if (!(score > kNegInf)) score = kNegInf;  // NaN counts as -inf
    std::int64_t at = count;
    if (count == k) {
      if (score < scores[0]) return;
      for (at = 0; at + 1 < k && scores[at + 1] <= score; ++at) {
        scores[at] = scores[at + 1];
        blocks[at] = blocks[at + 1];
      }
    } else {
      for (; at > 0 && scores[at - 1] > score; --at) {
        scores[at] = scores[at - 1];
        blocks[at] = blocks[at - 1];
      }
      ++count;
    }
    scores[at] = score;
    blocks[at] = block;
  }
};

/// Adds the forced blocks, sorts ascending and pads with -1. Returns the number of blocks.
inline std::int64_t finish_row(const Call& call, const Candidates& candidates, std::int64_t count,
                               std::int64_t width, std::int32_t* blocks) {
  for (std::int64_t sink = 0; sink < std::min(candidates.first, width - count); ++sink)
    blocks[count + sink] = static_cast<std::int32_t>(sink);
  count = std::min(count + candidates.first, width);
  if (!call.routing.causal && candidates.own >= 0)
    blocks[count++] = static_cast<std::int32_t>(candidates.own);
  std::sort(blocks, blocks + count);
  std::fill(blocks + count, blocks + width, -1);
  return count;
}

}  // namespace moba::cpu
