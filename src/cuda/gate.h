#pragma once

#include "cuda/stages.h"

namespace moba::cuda {

/// Scratch memory for the top-k lists of rows with long lists; short ones stay in registers.
std::uint64_t* carve_gate(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// Scores every query against the means of its candidates and keeps the best: `selection` [heads, rows,
/// width], ascending, padded with -1. A causal row's own block is not listed. No score is ever stored.
void gate(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
          const void* means, std::uint64_t* best, std::int32_t* selection);

/// Writes a slice's rows of the caller's list [Hq, Tq, selection_width], own block included.
void write_selection(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                     const std::int32_t* selection, std::int32_t* out);

/// Reads a slice's rows of `selection` from the caller's list. Entries that are not blocks of their row are
/// ignored.
void read_selection(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                    const std::int32_t* saved, std::int32_t* selection);

}  // namespace moba::cuda
