#pragma once

#include <algorithm>
#include <cstdint>

#include "backend.h"
#include "cpu/sizes.h"
#include "cpu/walk.h"

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

/// What a gradient is computed on: f32 multiply-adds, or AMX in bf16 or in f32 split into parts.
enum class Units { multiply_add, bf16, split };

struct Gradient {
  const Problem& problem;
  const Plan& plan;
  const Backward& backward;
  Group group;
  Sums dq, dk, dv;
  RowStats* stats;  // [query heads of the group, tokens]
  Units units;

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

/// Rows that add to a chunk's gradients together: enough to outweigh reading and writing those, few enough
/// to stay beside them in the second-level cache.
constexpr std::size_t kBatch = 112;

/// Of one worker; the packed chunk and its gradients follow it in memory.
struct alignas(64) BackwardScratch {
  float queries[kBatch * kRowStride];  // times scale x log2(e)
  float d_outs[kBatch * kRowStride];
  float weights[kBatch * kScoreStride];
  float d_logits[kBatch * kScoreStride];
  float dq[kMaxTileRows * kRowStride];
  float widened[(kMaxLanes + 1) * kMaxHeadDim];  // the last row stays zero
  float* dq_rows[kMaxTileRows];
  float ones[kMaxTileRows];
  std::size_t seen[kBatch];  // keys of the chunk that each row sees, ascending
};

/// The same on matrix units: rows of a batch and keys whose logits are held at a time.
constexpr std::size_t kSplitRows = 128, kSplitTiles = kSplitRows / 32, kSplitRowWords = kSplitRows / 2,
                      kSplitKeys = 128;
/// Block size from which f32 gradients are faster in parts than by multiply-adds.
constexpr std::int64_t kSplitFrom = 1024;

struct alignas(64) SplitScratch {
  std::uint32_t weights[kMaxParts * kSplitKeys * kSplitRowWords];  // [part][key][rows / 2]
  std::uint32_t d_logits[kMaxParts * kSplitKeys * kSplitRowWords];
  std::uint32_t d_logit_panels[kSplitTiles * kMaxParts * kSplitKeys / 2 * 32];  // [tile][part][keys / 2][32]
  std::uint32_t words[kMaxParts * kMaxLanes * kMaxHeadDim / 2];
  float logits[kSplitKeys * 32], d_weights[kSplitKeys * 32];  // of one tile
  float lse[kSplitRows], delta[kSplitRows];
  std::int32_t seen[kSplitRows];
};

/// Of one worker, the gradients of its keys included.
inline std::size_t split_descent_floats(std::int64_t head_dim) {
  const std::size_t depth = padded_dim(head_dim);
  return sizeof(SplitScratch) / sizeof(float) +
         depth * (kMaxParts * (3 * kChunk / 2 + 2 * kSplitTiles * 16 + 2 * kSplitRowWords) + kSplitRows +
                  2 * kChunk);
}

constexpr float kLog2E = 1.44269504F, kLn2 = 0.69314718F;

inline Chunking chunking_of(const Problem& problem, const SequenceView& sequence) {
  constexpr auto kMost = static_cast<std::int64_t>(kChunk);
  const std::int64_t keys = std::clamp<std::int64_t>(sequence.keys, 1, problem.routing.block_size),
                     chunks = (keys + kMost - 1) / kMost;
  return {chunks, static_cast<std::int64_t>(
                      round_up(static_cast<std::size_t>((keys + chunks - 1) / chunks), kMaxCols))};
}

/// Chunk `index` of a sequence and who in the range sees it; `count` is 0 when nobody does.
inline Chunk chunk_of(const Gradient& g, const SequenceView& sequence, const Range& range,
                      const Chunking& chunking, std::int64_t index) {
  const Problem& problem = g.problem;
  const std::int64_t block = index / chunking.of_block, block_first = block * problem.routing.block_size;
  const std::int64_t end = std::min(block_first + problem.routing.block_size, sequence.keys);
  Chunk chunk{.first = block_first + index % chunking.of_block * chunking.size};
  chunk.count = std::clamp<std::int64_t>(end - chunk.first, 0, chunking.size);
  if (chunk.count == 0) return chunk;
  if (g.plan.rows.size() > 0) chunk.chosen = g.plan.rows_of(range, block);
  if (problem.routing.causal) {
    const std::int64_t zero = sequence.position(range.q0), tokens = range.q1 - range.q0;
    chunk.own_first = std::clamp<std::int64_t>(chunk.first - zero, 0, tokens) * problem.group;
    chunk.own_last = std::clamp<std::int64_t>(end - zero, 0, tokens) * problem.group;
  }
  if (chunk.chosen.empty()) {
    const std::int64_t last = sequence.position(range.q0 + (chunk.own_last - 1) / problem.group);
    chunk.count = chunk.own_first == chunk.own_last ? 0 : std::min(chunk.count, last + 1 - chunk.first);
  }
  return chunk;
}

}  // namespace moba::cpu
