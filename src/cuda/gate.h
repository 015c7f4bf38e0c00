#pragma once

#include "cuda/stages.h"

namespace moba::cuda {

/// Scratch memory for the heaps of long top-k lists; short ones are in shared memory, and this is null.
std::uint64_t* carve_gate(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// The slice's rows in scratch memory.
SelectionRows carve_selection(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// Scores every query against the means of its candidates and keeps the best in `selection`. No score is ever
/// stored.
void gate(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
          const void* means, std::uint64_t* heaps, const SelectionRows& selection);

/// Returns whether gate_sm90 runs the call: if has_sm90, unless MOBA_CUDA_ARCH is "sm80".
bool gate_uses_sm90(const DeviceCall& call);
/// The same on sm90.
void gate_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
               const void* means, std::uint64_t* heaps, const SelectionRows& selection);

/// One of the two, whichever runs the call.
void select_best(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                 const void* means, std::uint64_t* heaps, const SelectionRows& selection);

/// Writes the selection of a call that needs no scores: every visible block if dense, else the own block.
void write_unscored_selection(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                              const Batch& batch, const SelectionRows& selection);

}  // namespace moba::cuda
