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

Memory carve(Carver& carver, const Task& task, const DeviceBatch& batch, const Group& part, bool attends) {
  Memory memory{.starts = carve_starts(carver, task, batch)};
  if (task.needs_scores()) {
    memory.means = carver.take<std::uint16_t>(part.heads() * task.most_blocks() * task.head_dim);
    memory.selection = carver.take<std::int32_t>(part.heads() * task.rows(part) * task.width);
    memory.best = carve_gate(carver, task, part);
  }
  if (attends) {
    memory.plan = carve_plan(carver, task, part);
    memory.partials = carve_partials(carver, task, part);
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
  const bool on_hopper = attends && attends_on_hopper(function, task);
  if (task.tokens == 0 || task.sequences == 0) return;

  const auto bytes = [&](const Group& part) {
    Carver carver;
    carve(carver, task, batch, part, attends);
    return carver.used();
  };
  const std::vector<Group> parts = parts_within(function, task, execution, bytes);
  Queue queue(function, execution);
  const Slab slab(queue, bytes(parts.front()));
  for (const Group& part : parts) {
    Carver carver(slab.data());
    const Memory memory = carve(carver, task, batch, part, attends);
    const Batch on_device = lay_out(queue, task, batch, part, memory.starts);
    if (task.needs_scores()) {
      centroids(queue, task, part, on_device, memory.means);
      gate(queue, task, part, on_device, memory.means, memory.best, memory.selection);
    }
    if (outputs.selection != nullptr)
      write_selection(queue, task, part, on_device, memory.selection, outputs.selection);
    if (!attends) continue;  // the routing alone was asked for
    plan(queue, task, part, on_device, memory.selection, memory.plan);
    (on_hopper ? attend_on_hopper : attend)(queue, task, part, on_device, memory.plan, memory.partials,
                                            outputs);
    combine(queue, task, part, memory.selection, memory.partials, outputs);
  }
  if (execution.profile != nullptr)
    execution.profile->workspace_bytes = std::max(execution.profile->workspace_bytes, bytes(parts.front()));
}

}  // namespace moba::cuda
