#pragma once

#include "cuda/plan.h"

namespace moba::cuda {

/// Answers of rows to some of their keys, each normalised by itself: [heads, rows * ranks] slots.
struct Partials {
  void* out = nullptr;   // [.., D], in the dtype of q
  float* lse = nullptr;  // natural logarithms
};

Partials carve_partials(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// Shared memory that a thread block takes, at most.
std::size_t attend_shared_bytes(std::int64_t head_dim);

/// Fills the slots that the plan names and those of diagonal keys; where a row has diagonal keys alone,
/// writes the outputs instead.
void attend(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
            const Plan& plan, const Partials& partials, const Outputs& outputs);

/// Whether the kernel for Hopper takes over: where it can and a tile of its 128 keys would not be half empty,
/// unless the environment's MOBA_CUDA_ARCH says "sm80" or "sm90". An Error where it cannot, but must.
bool uses_sm90(const DeviceCall& call);
/// What `attend` does.
void attend_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                 const Plan& plan, const Partials& partials, const Outputs& outputs);

/// Merges each row's slots in the order of their ranks, and writes the outputs.
void combine(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const std::int32_t* selection,
             const Partials& partials, const Outputs& outputs);

}  // namespace moba::cuda
