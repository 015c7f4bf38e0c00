#pragma once

#include "cuda/stages.h"

namespace moba::cuda {

/// Up to kTileRows rows of one head that selected one block: entries [first, first + count) of the head's
/// list.
struct RoutedTile {
  std::int32_t head = 0;   // of the slice
  std::int32_t block = 0;  // packed
  std::uint32_t first = 0, count = 0;
};

/// The selection inverted, on the device: for every head and block the entries that selected it, ascending.
/// Entry `row * ranks + rank` is one selected block of a row, and the slot of its partial result.
struct Plan {
  std::uint32_t* entries = nullptr;   // [heads, rows * width]
  std::uint32_t* offsets = nullptr;   // [heads, max_blocks + 1], into a head's entries
  std::uint32_t* counts = nullptr;    // [heads, partitions, max_blocks], then their exclusive prefix sums
  std::uint32_t* arrivals = nullptr;  // [heads], thread blocks that have scanned their counts
  /// Tiles of kTileRows rows, and the remainder of every block, in no particular order.
  RoutedTile *full = nullptr, *partial = nullptr;
  /// Counts of both.
  std::uint32_t* totals = nullptr;  // [kTotals]

  static constexpr int kFull = 0, kPartial = 1, kTotals = 2;
};

Plan carve_plan(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);
void plan(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
          const SelectionRows& selection, const Plan& plan);

}  // namespace moba::cuda
