#pragma once

#include "cuda/plan.h"

namespace moba::cuda {

/// Partial results of rows over some of their keys, each normalised by itself: [heads, rows * ranks] slots.
struct Partials {
  void* out = nullptr;   // [.., D], in the dtype of q
  float* lse = nullptr;  // natural logarithms
};

Partials carve_partials(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// Largest shared memory of a thread block, in bytes.
std::size_t attend_shared_bytes(std::int64_t head_dim);

/// Fills the slots that the plan names and those of diagonal keys; where a row has diagonal keys alone,
/// writes the outputs instead.
void attend(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
            const Plan& plan, const Partials& partials, const Outputs& outputs);

/// Returns whether the build, the device and the head dimension allow sm90 kernels.
bool has_sm90(std::int64_t head_dim);
/// Returns whether the sm90 kernels run the call: if they support it and a tile of 128 keys would be over
/// half full, unless MOBA_CUDA_ARCH is "sm80" or "sm90". Throws ArgumentError if it is "sm90" and they do
/// not.
bool uses_sm90(const DeviceCall& call);
/// The same on sm90.
void attend_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                 const Plan& plan, const Partials& partials, const Outputs& outputs);

/// Merges each row's slots in the order of their ranks, and writes the outputs.
void combine(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
             const SelectionRows& selection, const Partials& partials, const Outputs& outputs);

}  // namespace moba::cuda
