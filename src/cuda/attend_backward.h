#pragma once

#include "cuda/plan.h"

/// The backward pass in two passes that share only LSE and delta of each row, as the reference's does: by row
/// for dq, then by key for dk and dv. A single pass needs five products, but it reads and writes growing sums
/// in memory; two passes need seven, keep the weights in registers, and fix the order of every sum.
namespace moba::cuda {

/// LSE of a row to base 2 (+inf if it sees nothing, so that its weights are 0), and delta = <d_out, out>.
struct LseDelta {
  float lse = 0, delta = 0;
};

/// Sums of all rows of a slice, [heads, rows].
void compute_delta(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Backward& backward,
                   LseDelta* sums);

/// A segment of the rows that selected one block, beyond the first ones: splits the gradient of a block that
/// very many rows selected.
struct Segment {
  std::int32_t head = 0, block = 0;    // of the slice; packed
  std::uint32_t first = 0, count = 0;  // entries of the head's list
};

/// Memory of the dk/dv pass.
struct DkvPlan {
  std::int32_t* key_tile_starts = nullptr;  // [sequences + 1], key tiles before each sequence
  Segment* segments = nullptr;              // [max_segments], those of a block side by side
  std::uint32_t* first_segment = nullptr;   // [heads, max_blocks], of blocks that have any
  std::uint32_t* count = nullptr;           // of segments
  float* sums = nullptr;  // [max_segments, key tiles of a block], dk and dv of a key tile, f32
};

/// `slice` spans all tokens.
DkvPlan carve_dkv_plan(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// Counts key tiles, and splits blocks that very many rows selected.
void plan_dkv(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
              const Plan& plan, const DkvPlan& dkv_plan);

/// dk and dv of the slice's heads.
void attend_backward_dkv(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                         const Plan& plan, const LseDelta* sums, const Backward& backward,
                         const DkvPlan& dkv_plan);
/// The same where `uses_sm90`.
void attend_backward_dkv_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                              const Batch& batch, const Plan& plan, const LseDelta* sums,
                              const Backward& backward, const DkvPlan& dkv_plan);

/// Gradients of rows through some of their keys, [heads, rows * ranks, D] in the dtype of q.
void* carve_dq_slots(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice);

/// Fills the slots, or writes dq where rows have diagonal keys alone.
void attend_backward_dq(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                        const Plan& plan, const LseDelta* sums, const Backward& backward, void* slots);
/// The same where `uses_sm90`.
void attend_backward_dq_sm90(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                             const Batch& batch, const Plan& plan, const LseDelta* sums,
                             const Backward& backward, void* slots);

/// dq of the slice's rows, where there are slots.
void sum_dq_slots(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                  const SelectionRows& selection, const void* slots, const Backward& backward);

/// Largest shared memory of a thread block of either pass, in bytes.
std::size_t attend_backward_shared_bytes(std::int64_t head_dim);
std::size_t attend_backward_dkv_shared_bytes(std::int64_t head_dim);

}  // namespace moba::cuda
