#pragma once

#include <algorithm>
#include <cstdint>

#include "backend.h"
#include "constants.h"
#include "cpu/key_tiles.h"
#include "cpu/sizes.h"

/// State shared by the workers of the backward pass.
namespace moba::cpu {

/// f32 accumulators [tokens, heads, D], heads counted from `head0`: the output tensor itself where it is f32,
/// else scratch memory.
struct AccumulatorView {
  float* data = nullptr;
  std::int64_t token_stride = 0, head_stride = 0, head0 = 0;

  float* row(std::int64_t token, std::int64_t head) const {
    return data + token * token_stride + (head - head0) * head_stride;
  }
};

/// Statistics of one row: its log-sum-exp in units of log2, +inf where the row sees nothing, and delta =
/// <d_out, out>.
struct RowStats {
  float lse, delta;
};

/// Units that compute the gradient: f32 multiply-adds, or AMX in bf16, or AMX in f32 split into bf16 parts.
enum class Units { fma, amx_bf16, amx_bf16x6 };

struct BackwardState {
  const Call& call;
  const Plan& plan;
  const Backward& backward;
  WorkSlice slice;
  AccumulatorView dq, dk, dv;
  RowStats* stats;  // [query heads of the slice, tokens]
  Units units;
  Cancel& cancelled;

  RowStats& stats_of(std::int64_t q_head, std::int64_t token) const {
    return stats[(q_head - slice.head0 * call.heads_per_kv) * call.tokens + token];
  }
};

/// The queries of one range against the key tiles whose index is `part` modulo `parts`.
struct BackwardTile {
  const Range* range = nullptr;
  std::int64_t part = 0, parts = 1;
  std::int64_t first_key = 0;  // of the sequence, among the packed keys
  std::int64_t work = 0;       // rows x keys, about
};

/// Partition of a sequence's keys into key tiles that never cross blocks.
struct KeyTiling {
  std::int64_t tiles_per_block = 1, size = 1;  // keys per tile
};

/// Rows that are accumulated into a key tile's gradients together: enough to outweigh reading and writing
/// those gradients, few enough to stay beside them in the second-level cache.
constexpr std::size_t kBatch = 112;

/// Scratch memory of one worker; the packed key tile and its gradients follow it.
struct alignas(64) BackwardScratch {
  float queries[kBatch * kRowStride];  // times scale x log2(e)
  float d_outs[kBatch * kRowStride];
  float weights[kBatch * kScoreStride];
  float d_logits[kBatch * kScoreStride];
  float dq[kMaxTileRows * kRowStride];
  float f32_rows[(kMaxLanes + 1) * kMaxHeadDim];  // the last row stays zero
  float* dq_rows[kMaxTileRows];
  float ones[kMaxTileRows];
  std::size_t seen[kBatch];  // keys of the key tile that each row sees, ascending
};

/// Rows per batch on AMX, and keys whose logits are held at a time.
constexpr std::size_t kAmxRows = 128, kAmxRowTiles = kAmxRows / 32, kAmxRowWords = kAmxRows / 2,
                      kAmxKeys = 128;
/// Smallest block size at which f32 gradients are faster as products of bf16 parts than by multiply-adds, as
/// measured.
constexpr std::int64_t kMinBf16x6BlockSize = 1024;

struct alignas(64) AmxBackwardScratch {
  std::uint32_t weights[kMaxParts * kAmxKeys * kAmxRowWords];  // [part][key][rows / 2]
  std::uint32_t d_logits[kMaxParts * kAmxKeys * kAmxRowWords];
  std::uint32_t d_logit_panels[kAmxRowTiles * kMaxParts * kAmxKeys / 2 * 32];  // [tile][part][keys / 2][32]
  std::uint32_t words[kMaxParts * kMaxLanes * kMaxHeadDim / 2];
  float logits[kAmxKeys * 32], d_weights[kAmxKeys * 32];  // of one tile
  float lse[kAmxRows], delta[kAmxRows];
  std::int32_t seen[kAmxRows];
};

/// Scratch floats of one AMX worker, the gradients of its keys included.
inline std::size_t amx_backward_floats(std::int64_t head_dim) {
  const std::size_t depth = padded_dim(head_dim);
  return sizeof(AmxBackwardScratch) / sizeof(float) +
         depth * (kMaxParts * (3 * kKeyTileSize / 2 + 2 * kAmxRowTiles * 16 + 2 * kAmxRowWords) + kAmxRows +
                  2 * kKeyTileSize);
}

inline KeyTiling key_tiling_of(const Call& call, const SequenceView& sequence) {
  constexpr auto kMaxKeys = static_cast<std::int64_t>(kKeyTileSize);
  const std::int64_t keys = std::clamp<std::int64_t>(sequence.keys, 1, call.routing.block_size),
                     key_tiles = (keys + kMaxKeys - 1) / kMaxKeys;
  return {key_tiles, static_cast<std::int64_t>(
                         round_up(static_cast<std::size_t>((keys + key_tiles - 1) / key_tiles), kMaxCols))};
}

/// Returns key tile `index` of a sequence and the rows of the range that see it; `count` is 0 when no row
/// does.
inline KeyTile key_tile_of(const BackwardState& g, const SequenceView& sequence, const Range& range,
                           const KeyTiling& tiling, std::int64_t index) {
  const Call& call = g.call;
  const std::int64_t block = index / tiling.tiles_per_block, block_first = block * call.routing.block_size;
  const std::int64_t end = std::min(block_first + call.routing.block_size, sequence.keys);
  KeyTile key_tile{.first = block_first + index % tiling.tiles_per_block * tiling.size};
  key_tile.count = std::clamp<std::int64_t>(end - key_tile.first, 0, tiling.size);
  if (key_tile.count == 0) return key_tile;
  if (g.plan.rows.size() > 0) key_tile.selected = g.plan.rows_of(range, block);
  if (call.routing.causal) {
    const std::int64_t zero = sequence.position(range.q0), tokens = range.q1 - range.q0;
    key_tile.own_first = std::clamp<std::int64_t>(key_tile.first - zero, 0, tokens) * call.heads_per_kv;
    key_tile.own_last = std::clamp<std::int64_t>(end - zero, 0, tokens) * call.heads_per_kv;
  }
  if (key_tile.selected.empty()) {
    const std::int64_t last = sequence.position(range.q0 + (key_tile.own_last - 1) / call.heads_per_kv);
    key_tile.count =
        key_tile.own_first == key_tile.own_last ? 0 : std::min(key_tile.count, last + 1 - key_tile.first);
  }
  return key_tile;
}

}  // namespace moba::cpu
