#include "cuda/flow.h"

#include <algorithm>

#include "cuda/attend.h"
#include "cuda/gate.h"
#include "cuda/parts.h"

namespace moba::cuda {
namespace {

/// Device memory of a part.
struct Memory {
  Starts starts{};
  void* means = nullptr;
  std::int32_t* selection = nullptr;
  std::uint64_t* best = nullptr;
  Plan plan{};
  Partials partials{};
};

Memory carve(ArenaLayout& layout, const Task& task, const DeviceBatch& batch, const WorkSlice& part,
             bool attends) {
  Memory memory{.starts = carve_starts(layout, task, batch)};
  if (task.needs_scores()) {
    memory.means = layout.take<std::uint16_t>(part.heads() * task.most_blocks() * task.head_dim);
    memory.selection = layout.take<std::int32_t>(part.heads() * task.rows(part) * task.width);
    memory.best = carve_gate(layout, task, part);
  }
  if (attends) {
    memory.plan = carve_plan(layout, task, part);
    memory.partials = carve_partials(layout, task, part);
  }
  return memory;
}

}  // namespace

void attention(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v,
               const DeviceBatch& batch, const Routing& routing, const Outputs& outputs,
               const Execution& execution) {
  const bool attends = outputs.out.data != nullptr;
  const Task task = make_task(function, q, k, v, batch, routing);
  if (attends) check_view(function, "out", outputs.out);
  check_list(function, "lse", outputs.lse);
  check_list(function, "selection", outputs.selection);
  const bool on_sm90 = attends && uses_sm90(function, task);
  if (task.tokens == 0 || task.sequences == 0) return;

  const auto bytes = [&](const WorkSlice& part) {
    ArenaLayout layout;
    carve(layout, task, batch, part, attends);
    return layout.used();
  };
  const std::vector<WorkSlice> parts = parts_within(function, task, execution, bytes);
  Stream stream(function, execution);
  const Arena arena(stream, bytes(parts.front()));
  for (const WorkSlice& part : parts) {
    ArenaLayout layout(arena.data());
    const Memory memory = carve(layout, task, batch, part, attends);
    const Batch on_device = lay_out(stream, task, batch, part, memory.starts);
    if (task.needs_scores()) {
      centroids(stream, task, part, on_device, memory.means);
      gate(stream, task, part, on_device, memory.means, memory.best, memory.selection);
    }
    if (outputs.selection != nullptr)
      write_selection(stream, task, part, on_device, memory.selection, outputs.selection);
    if (!attends) continue;  // the routing alone was asked for
    plan(stream, task, part, on_device, memory.selection, memory.plan);
    (on_sm90 ? attend_sm90 : attend)(stream, task, part, on_device, memory.plan, memory.partials, outputs);
    combine(stream, task, part, memory.selection, memory.partials, outputs);
  }
  if (execution.profile != nullptr)
    execution.profile->workspace_bytes = std::max(execution.profile->workspace_bytes, bytes(parts.front()));
}

}  // namespace moba::cuda
