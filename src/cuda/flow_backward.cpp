#include <algorithm>

#include "cuda/attend.h"
#include "cuda/attend_backward.h"
#include "cuda/flow.h"
#include "cuda/gate.h"
#include "errors.h"
#include "selection.h"

namespace moba::cuda {
namespace {

/// Device memory of a slice. Data of all tokens of a head persist across slices; routing, the dk/dv pass and
/// the dq pass share the remaining memory.
struct Memory {
  Starts starts{};
  LseDelta* sums = nullptr;  // [heads, rows of all tokens]
  SelectionRows selection{};

  void* means = nullptr;
  std::uint64_t* heaps = nullptr;

  Plan plan{};
  DkvPlan keys{};

  Plan slice_plan{};  // aliases `plan` if the slice spans all tokens
  void* slots = nullptr;

  std::size_t bytes = 0;
};

WorkSlice all_tokens_of(const DeviceCall& call, const WorkSlice& slice) {
  return {slice.head0, slice.head1, 0, call.tokens};
}

bool selects(const DeviceCall& call, const Saved& saved) {
  return call.needs_scores() && saved.selection == nullptr;
}

Memory carve(std::byte* arena, const DeviceCall& call, const DeviceBatch& batch, const WorkSlice& slice,
             const Saved& saved) {
  const WorkSlice all = all_tokens_of(call, slice);
  ArenaLayout layout(arena);
  Memory memory{.starts = carve_starts(layout, call, batch)};
  memory.sums = layout.take<LseDelta>(all.heads() * call.rows(all));
  if (call.needs_scores())
    memory.selection = selects(call, saved) ? carve_selection(layout, call, all) : rows_in(saved, call);
  if (call.is_selected()) memory.selection = selected_rows(call);
  ArenaLayout routing = layout, by_key = layout, by_row = layout;
  if (selects(call, saved)) {
    memory.means = routing.take<std::uint16_t>(all.heads() * call.max_blocks() * call.head_dim);
    memory.heaps = carve_gate(routing, call, all);
  }
  memory.plan = carve_plan(by_key, call, all);
  memory.keys = carve_dkv_plan(by_key, call, all);
  memory.slice_plan = carve_plan(by_row, call, slice);
  memory.slots = carve_dq_slots(by_row, call, slice);
  memory.bytes = std::max({routing.used(), by_key.used(), by_row.used()});
  return memory;
}

void check_rows(const DeviceCall& call) {
  if (slots_are_countable(call, {0, 1, 0, call.tokens})) return;
  refuse("q", "expected fewer than 2^31 selected blocks in the rows of a kv head (backend cuda), got ",
         call.tokens, " tokens of ", call.heads_per_kv, " query heads with top_k ", call.routing.top_k);
}

}  // namespace

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const DeviceBatch& batch, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  const DeviceCall call = make_call(q, k, v, batch, routing);
  check_shared(call.head_dim, attend_backward_shared_bytes(call.head_dim));
  check_rows(call);
  check_view("d_out", d_out);
  check_view("saved.out", saved.out);
  check_view("dq", gradients.dq);
  check_view("dk", gradients.dk);
  check_view("dv", gradients.dv);
  check_list("saved.lse", saved.lse);
  check_list("saved.selection", saved.selection);
  const bool on_sm90 = uses_sm90(call);
  if (call.sequences == 0 || (call.tokens == 0 && call.keys == 0)) return;

  const Backward backward{d_out, saved.out, saved.lse, gradients};
  const auto bytes = [&](const WorkSlice& slice) { return carve(nullptr, call, batch, slice, saved).bytes; };
  const std::vector<WorkSlice> slices = slices_of(call, execution, bytes);
  Stream stream(execution);
  const Arena arena(stream, bytes(slices.front()));
  for (const WorkSlice& slice : slices) {
    const Memory memory = carve(arena.data(), call, batch, slice, saved);
    const WorkSlice all = all_tokens_of(call, slice);
    const bool whole = slice.tokens() == call.tokens;
    if (slice.token0 == 0) {
      const Batch on_device = lay_out(stream, call, batch, all, memory.starts);
      compute_delta(stream, call, all, backward, memory.sums);
      if (selects(call, saved)) {
        centroids(stream, call, all, on_device, memory.means);
        select_best(stream, call, all, on_device, memory.means, memory.heaps, memory.selection);
      }
      plan(stream, call, all, on_device, memory.selection, memory.plan);
      plan_dkv(stream, call, all, on_device, memory.plan, memory.keys);
      (on_sm90 ? attend_backward_dkv_sm90 : attend_backward_dkv)(stream, call, all, on_device, memory.plan,
                                                                 memory.sums, backward, memory.keys);
    }
    const Batch on_device = lay_out(stream, call, batch, slice, memory.starts);
    if (!whole) plan(stream, call, slice, on_device, memory.selection, memory.slice_plan);
    (on_sm90 ? attend_backward_dq_sm90 : attend_backward_dq)(
        stream, call, slice, on_device, memory.slice_plan, memory.sums + slice.token0 * call.heads_per_kv,
        backward, memory.slots);
    sum_dq_slots(stream, call, slice, on_device, memory.selection, memory.slots, backward);
  }
  if (execution.profile != nullptr)
    execution.profile->workspace_bytes = std::max(execution.profile->workspace_bytes, bytes(slices.front()));
}

}  // namespace moba::cuda
