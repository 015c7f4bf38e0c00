#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cpu/sizes.h"
#include "cpu/topk.h"
#include "moba/attention.h"

/// The work of a decode call: its units, and the splits that their keys are cut into.
namespace moba::cpu {

constexpr std::int64_t kMinSplitKeys = 64, kMaxSplitKeys = 512, kSplitMeans = 256;

/// Keys [first, first + count) of a block.
struct KvSplit {
  std::int64_t block = 0, first = 0, count = 0;
};

/// One query token at one kv head: its inputs, its partial results, and the progress of the threads. Splits
/// of the token's own block, which need not wait for the gate, come first; those of the selected blocks
/// follow.
struct alignas(64) DecodeUnit {
  std::size_t sequence = 0;
  std::int64_t head = 0, own = -1, keys = 0, block_size = 0;
  std::int64_t mean_splits =
      1;  // at least one, possibly empty: finishing the last one completes the selection
  std::int64_t split_keys = 0, own_splits = 0, block_splits = 0;
  std::int64_t splits = 0;  // known once gate_done
  Candidates candidates;
  std::int64_t listed = 0;              // longest top-k list of a split of the means
  float* list_scores = nullptr;         // [mean_splits][group][listed]
  std::int32_t* lists = nullptr;        // the blocks of these scores
  float* topk_scores = nullptr;         // [group][width], scores of the selected blocks
  float* queries = nullptr;             // [group][kMaxHeadDim], f32, unscaled, zero padded
  std::int32_t* selected = nullptr;     // [group][width]
  std::int32_t* blocks = nullptr;       // union of the selections without the own block, ascending
  float* partials = nullptr;            // [splits][group][stride]
  const KeyWeights* weights = nullptr;  // null: not computed
  std::int64_t ranges_per_split = 0;    // that a split may reach into
  float* range_sums = nullptr;          // [splits][group][ranges_per_split], unnormalised

  alignas(64) std::atomic<std::int64_t> next_means = 0, means_left = 0;
  std::atomic<std::int64_t> next_split = 0, splits_left = 0;
  std::atomic<bool> gate_done = false;

  const float* query(std::int64_t g) const { return queries + static_cast<std::size_t>(g) * kMaxHeadDim; }
  bool sees(std::int64_t width, std::int64_t g, std::int64_t block) const {
    const std::int32_t* from = selected + g * width;
    return block == own || std::find(from, from + width, static_cast<std::int32_t>(block)) != from + width;
  }
  /// Keys [begin, end) of a split that are counted in `weights`, and the range of the first one.
  struct Counted {
    std::int64_t begin, end, range;
  };
  Counted counted(const KvSplit& split) const {
    return {split.first, std::min(split.first + split.count, weights->keys), split.first / weights->range};
  }
  KvSplit split(std::int64_t index) const {
    const std::int64_t other = index - own_splits;
    const std::int64_t block = other < 0 ? own : blocks[other / block_splits];
    const std::int64_t first = block * block_size + (other < 0 ? index : other % block_splits) * split_keys;
    return {block, first, std::min({split_keys, (block + 1) * block_size - first, keys - first})};
  }
};

}  // namespace moba::cpu
