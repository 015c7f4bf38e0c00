#include "cuda/flow.h"

#include <algorithm>

#include "cuda/attend.h"
#include "cuda/gate.h"
#include "selection.h"

namespace moba::cuda {
namespace {

/// Device memory of a slice.
struct Memory {
  Starts starts{};
  void* means = nullptr;
  SelectionRows selection{};
  std::uint64_t* heaps = nullptr;
  Plan plan{};
  Partials partials{};
};

Memory carve(ArenaLayout& layout, const DeviceCall& call, const DeviceBatch& batch, const WorkSlice& slice,
             const Outputs& outputs) {
  Memory memory{.starts = carve_starts(layout, call, batch)};
  if (call.needs_scores()) {
    memory.means = layout.take<std::uint16_t>(slice.heads() * call.max_blocks() * call.head_dim);
    memory.selection =
        outputs.selection != nullptr ? rows_in(outputs, call) : carve_selection(layout, call, slice);
    memory.heaps = carve_gate(layout, call, slice);
  }
  if (outputs.out.data != nullptr) {
    memory.plan = carve_plan(layout, call, slice);
    memory.partials = carve_partials(layout, call, slice);
  }
  return memory;
}

}  // namespace

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceBatch& batch,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  const bool attends = outputs.out.data != nullptr;
  const DeviceCall call = make_call(q, k, v, batch, routing);
  if (attends) check_view("out", outputs.out);
  check_list("lse", outputs.lse);
  check_list("selection", outputs.selection);
  const bool on_sm90 = attends && uses_sm90(call);
  if (call.tokens == 0 || call.sequences == 0) return;

  const auto bytes = [&](const WorkSlice& slice) {
    ArenaLayout layout;
    carve(layout, call, batch, slice, outputs);
    return layout.used();
  };
  const std::vector<WorkSlice> slices = slices_of(call, execution, bytes);
  Stream stream(execution);
  const Arena arena(stream, bytes(slices.front()));
  for (const WorkSlice& slice : slices) {
    ArenaLayout layout(arena.data());
    const Memory memory = carve(layout, call, batch, slice, outputs);
    const Batch on_device = lay_out(stream, call, batch, slice, memory.starts);
    if (call.needs_scores()) {
      // Later slices of the same heads find the means where the first has put them.
      if (slice.token0 == 0) centroids(stream, call, slice, on_device, memory.means);
      (gate_uses_sm90(call) ? gate_sm90 : gate)(stream, call, slice, on_device, memory.means, memory.heaps,
                                                memory.selection);
    }
    if (outputs.selection != nullptr && !call.needs_scores())
      write_unscored_selection(stream, call, slice, on_device, rows_in(outputs, call));
    if (!attends) continue;
    plan(stream, call, slice, on_device, memory.selection, memory.plan);
    (on_sm90 ? attend_sm90 : attend)(stream, call, slice, on_device, memory.plan, memory.partials, outputs);
    combine(stream, call, slice, memory.selection, memory.partials, outputs);
  }
  if (execution.profile != nullptr)
    execution.profile->workspace_bytes = std::max(execution.profile->workspace_bytes, bytes(slices.front()));
}

}  // namespace moba::cuda
