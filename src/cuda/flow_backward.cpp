#include <algorithm>

#include "cuda/attend.h"
#include "cuda/attend_backward.h"
#include "cuda/flow.h"
#include "cuda/gate.h"
#include "cuda/parts.h"

namespace moba::cuda {
namespace {

/// Device memory of a part. What a head needs for all of its tokens is kept from part to part; routing, the
/// dk/dv pass and the dq pass take turns in the rest.
struct Memory {
  Starts starts{};
  LseDelta* sums = nullptr;           // [heads, rows of all tokens]
  std::int32_t* selection = nullptr;  // [heads, rows of all tokens, width]

  void* means = nullptr;
  std::uint64_t* best = nullptr;

  Plan plan{};
  DkvPlan keys{};

  Plan part_plan{};  // `plan` again where the part is all there is
  void* slots = nullptr;

  std::size_t bytes = 0;
};

WorkSlice all_tokens_of(const Task& task, const WorkSlice& part) {
  return {part.head0, part.head1, 0, task.tokens};
}

Memory carve(std::byte* arena, const Task& task, const DeviceBatch& batch, const WorkSlice& part,
             bool selects) {
  const WorkSlice all = all_tokens_of(task, part);
  ArenaLayout layout(arena);
  Memory memory{.starts = carve_starts(layout, task, batch)};
  memory.sums = layout.take<LseDelta>(all.heads() * task.rows(all));
  memory.selection = layout.take<std::int32_t>(all.heads() * task.rows(all) * task.width);
  ArenaLayout routing = layout, by_key = layout, by_row = layout;
  if (selects) {
    memory.means = routing.take<std::uint16_t>(all.heads() * task.most_blocks() * task.head_dim);
    memory.best = carve_gate(routing, task, all);
  }
  memory.plan = carve_plan(by_key, task, all);
  memory.keys = carve_dkv_plan(by_key, task, all);
  memory.part_plan = carve_plan(by_row, task, part);
  memory.slots = carve_dq_slots(by_row, task, part);
  memory.bytes = std::max({routing.used(), by_key.used(), by_row.used()});
  return memory;
}

void check_rows(std::string_view function, const Task& task) {
  if (slots_are_countable(task, {0, 1, 0, task.tokens})) return;
  throw Error(std::string(function) +
              ": q: expected fewer than 2^31 selected blocks in the rows of a kv head (backend cuda), got " +
              std::to_string(task.tokens) + " tokens of " + std::to_string(task.group) +
              " query heads with top_k " + std::to_string(task.routing.top_k));
}

}  // namespace

void attention_backward(std::string_view function, const Tensor& d_out, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Saved& saved, const DeviceBatch& batch, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  const Task task = make_task(function, q, k, v, batch, routing);
  check_shared(function, task.head_dim, attend_backward_shared_bytes(task.head_dim));
  check_rows(function, task);
  check_view(function, "d_out", d_out);
  check_view(function, "saved.out", saved.out);
  check_view(function, "dq", gradients.dq);
  check_view(function, "dk", gradients.dk);
  check_view(function, "dv", gradients.dv);
  check_list(function, "saved.lse", saved.lse);
  check_list(function, "saved.selection", saved.selection);
  const bool on_sm90 = uses_sm90(function, task);
  if (task.sequences == 0 || (task.tokens == 0 && task.keys == 0)) return;

  const Backward backward{d_out, saved.out, saved.lse, gradients};
  const bool selects = task.needs_scores() && saved.selection == nullptr;
  const auto bytes = [&](const WorkSlice& part) { return carve(nullptr, task, batch, part, selects).bytes; };
  // Keys that no query sees have gradients too: 0.
  const std::vector<WorkSlice> parts = task.tokens == 0 ? std::vector<WorkSlice>{{0, task.kv_heads, 0, 0}}
                                                        : parts_within(function, task, execution, bytes);
  Stream stream(function, execution);
  const Arena arena(stream, bytes(parts.front()));
  for (const WorkSlice& part : parts) {
    const Memory memory = carve(arena.data(), task, batch, part, selects);
    const WorkSlice all = all_tokens_of(task, part);
    const bool whole = part.tokens() == task.tokens;
    if (part.token0 == 0) {
      const Batch on_device = lay_out(stream, task, batch, all, memory.starts);
      compute_delta(stream, task, all, backward, memory.sums);
      if (selects) {
        centroids(stream, task, all, on_device, memory.means);
        gate(stream, task, all, on_device, memory.means, memory.best, memory.selection);
      } else if (task.needs_scores()) {
        read_selection(stream, task, all, on_device, saved.selection, memory.selection);
      }
      plan(stream, task, all, on_device, memory.selection, memory.plan);
      plan_dkv(stream, task, all, on_device, memory.plan, memory.keys);
      (on_sm90 ? attend_backward_dkv_sm90 : attend_backward_dkv)(stream, task, all, on_device, memory.plan,
                                                                 memory.sums, backward, memory.keys);
    }
    const Batch on_device = lay_out(stream, task, batch, part, memory.starts);
    const std::int32_t* selection = memory.selection + part.token0 * task.group * task.width;
    if (!whole) plan(stream, task, part, on_device, selection, memory.part_plan);
    (on_sm90 ? attend_backward_dq_sm90 : attend_backward_dq)(stream, task, part, on_device, memory.part_plan,
                                                             memory.sums + part.token0 * task.group, backward,
                                                             memory.slots);
    sum_dq_slots(stream, task, part, selection, memory.slots, backward);
  }
  if (execution.profile != nullptr)
    execution.profile->workspace_bytes = std::max(execution.profile->workspace_bytes, bytes(parts.front()));
}

}  // namespace moba::cuda
