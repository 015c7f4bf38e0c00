// Selections in device memory: scratch for them, and those of calls that need no scores.
#include "selection.h"

#include "cuda/gate_rows.h"

namespace moba::cuda {
namespace {

constexpr int kListThreads = 128;

struct ListParams {
  SelectionRows selection;
  Batch batch;
  std::int64_t block_size, heads_per_kv, head0, rows, token0;
  bool causal, is_dense;
};

/// Uses one thread per row.
MOBA_KERNEL(kListThreads, 8) list_unscored_kernel(MOBA_GRID_CONSTANT ListParams p) {
  const std::int64_t head = ptx::block_y();
  const std::int64_t row = std::int64_t{ptx::block_x()} * kListThreads + ptx::thread();
  if (row >= p.rows) return;
  const auto token = static_cast<std::int32_t>(p.token0 + row / p.heads_per_kv);
  const std::int32_t s = sequence_of(p.batch.q_starts, p.batch.sequences, token);
  const std::int32_t keys = p.batch.k_starts[s + 1] - p.batch.k_starts[s];
  const std::int32_t last = p.causal ? token + keys - p.batch.q_starts[s + 1] : keys - 1;
  const std::int64_t end = last < 0 ? 0 : last / p.block_size + 1,
                     begin = p.is_dense || end == 0 ? 0 : end - 1;
  std::int32_t* to = p.selection.of((p.head0 + head) * p.heads_per_kv + row % p.heads_per_kv, token);
  for (std::int64_t i = 0; i < p.selection.stride; ++i)
    to[i] = begin + i < end ? static_cast<std::int32_t>(begin + i) : -1;
}

}  // namespace

std::uint64_t* carve_gate(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  if (heaps_are_shared(call)) return nullptr;
  return layout.take<std::uint64_t>(slice.heads() * call.max_tiles(slice) * kTileRows * call.width());
}

SelectionRows carve_selection(ArenaLayout& layout, const DeviceCall& call, const WorkSlice& slice) {
  const std::int64_t stride = call.selection_width;
  return rows_in(layout.take<std::int32_t>(slice.heads() * call.rows(slice) * stride), call, slice, stride);
}

void select_best(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
                 const void* means, std::uint64_t* heaps, const SelectionRows& selection) {
  (gate_uses_sm90(call) ? gate_sm90 : gate)(stream, call, slice, batch, means, heaps, selection);
}

void write_unscored_selection(Stream& stream, const DeviceCall& call, const WorkSlice& slice,
                              const Batch& batch, const SelectionRows& selection) {
  const ListParams params{.selection = selection,
                          .batch = batch,
                          .block_size = call.requested.block_size,
                          .heads_per_kv = call.heads_per_kv,
                          .head0 = slice.head0,
                          .rows = call.rows(slice),
                          .token0 = slice.token0,
                          .causal = call.routing.causal,
                          .is_dense = call.is_dense};
  stream.launch("list_unscored", list_unscored_kernel, {divide_up(params.rows, kListThreads), slice.heads()},
                kListThreads, 0, params);
}

}  // namespace moba::cuda
