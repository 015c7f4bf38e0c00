#pragma once

#include "cuda/stages.h"

/// Decode: one query for every sequence, over pages. The tokens of `call` are sequences here.
namespace moba::cuda {

/// Memory of a slice. Groups are kGroup consecutive candidates.
struct Decoding {
  static constexpr int kGroup = 16;

  std::uint32_t* orders = nullptr;  // [sequences, query heads, groups, kGroup], scores as tile::order_of says
  std::uint32_t* maxima = nullptr;  // [sequences, query heads, groups], of the orders of a group
  std::int32_t* best_groups = nullptr;  // [sequences, query heads, width], ascending
  std::int32_t* selection = nullptr;    // [sequences, query heads, width], ascending, padded with -1
  // Partial results of splits of blocks: [sequences, query heads, ranks, splits of a block].
  float* partials = nullptr;          // [.., D]
  float* partial_lse = nullptr;       // to base 2
  std::uint32_t* arrivals = nullptr;  // [sequences, query heads], partial results written
};

Decoding carve_decoding(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// Scores every query against the kept means of its candidates.
void decode_score(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                  const Decoding& decoding);
/// Selects the best candidates.
void decode_select(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                   const Decoding& decoding);
/// Copies the caller's selection in place of both.
void decode_take_selection(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                           const PagedCache& cache, const Decoding& decoding);
/// Attends to splits of the selected blocks and of the own block, and merges them in the order of their keys.
void decode_attend(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const PagedCache& cache,
                   const Decoding& decoding, const Outputs& outputs);

/// Computes the means of the blocks that were completed after `before` tokens.
void complete_means(Stream& stream, const DeviceCall& call, const PagedCache& cache,
                    const std::int32_t* before, std::int64_t max_added);

std::size_t decode_shared_bytes(std::int64_t head_dim);

}  // namespace moba::cuda
