#include "cuda/flow.h"

#include "cuda/attend.h"
#include "cuda/gate.h"
#include "errors.h"
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
  } else if (call.is_selected()) {
    memory.selection = selected_rows(call);
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

  const auto carve_slice = [&](ArenaLayout& layout, const WorkSlice& slice) {
    return carve(layout, call, batch, slice, outputs);
  };
  run_slices(call, execution, carve_slice, [&](Stream& stream, const WorkSlice& slice, const Memory& memory) {
    const Batch on_device = lay_out(stream, call, batch, slice, memory.starts);
    if (call.needs_scores()) {
      // Later slices of the same heads find the means where the first has put them.
      if (slice.token0 == 0) centroids(stream, call, slice, on_device, memory.means);
      select_best(stream, call, slice, on_device, memory.means, memory.heaps, memory.selection);
    }
    if (outputs.selection != nullptr && !call.needs_scores())
      write_unscored_selection(stream, call, slice, on_device, rows_in(outputs, call));
    if (!attends) return;
    plan(stream, call, slice, on_device, memory.selection, memory.plan);
    (on_sm90 ? attend_sm90 : attend)(stream, call, slice, on_device, memory.plan, memory.partials, outputs);
    combine(stream, call, slice, on_device, memory.selection, memory.partials, outputs);
  });
}

/// The gate keys take the place of the means.
void select(const GateInputs& gate, const DeviceBatch& batch, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  if (gate.k.dtype != gate.q.dtype)
    refuse("gate.k", "expected the dtype of gate.q, ", name_of(gate.q.dtype), " (backend cuda), got ",
           name_of(gate.k.dtype));
  DeviceCall call = make_call(gate.q, gate.k, gate.k, batch, routing);
  check_list("selection", outputs.selection);
  if (call.tokens == 0 || call.sequences == 0) return;
  call.keys = call.needs_scores() ? gate.k.sizes[0] * call.routing.block_size : call.max_seqlen_k;

  const auto carve_slice = [&](ArenaLayout& layout, const WorkSlice& slice) {
    return carve(layout, call, batch, slice, outputs);
  };
  run_slices(call, execution, carve_slice, [&](Stream& stream, const WorkSlice& slice, const Memory& memory) {
    const Batch on_device = lay_out(stream, call, batch, slice, memory.starts);
    if (call.needs_scores()) {
      if (slice.token0 == 0) lay_out_gate_keys(stream, call, slice, memory.means);
      select_best(stream, call, slice, on_device, memory.means, memory.heaps, memory.selection);
    } else {
      write_unscored_selection(stream, call, slice, on_device, rows_in(outputs, call));
    }
  });
}

void features(const Tensor& k, const DeviceBatch& batch, std::int64_t block_size, const BlockFeatures& to,
              const Execution& execution) {
  DeviceCall call = make_call(k, k, k, batch, {.block_size = block_size, .top_k = 1, .causal = false});
  for (const auto& [name, t] : {std::pair("features.mean", &to.mean), std::pair("features.max", &to.max),
                                std::pair("features.min", &to.min)}) {
    if (t->data == nullptr) continue;
    check_view(name, *t);
    if (t->dtype != k.dtype)
      refuse(name, "expected the dtype of k, ", name_of(k.dtype), " (backend cuda), got ", name_of(t->dtype));
  }
  if (call.keys == 0 || call.sequences == 0) return;
  ArenaLayout size;
  carve_starts(size, call, batch);
  Stream stream(execution);
  const Arena arena(stream, size.used());
  ArenaLayout layout(arena.data());
  const WorkSlice all{0, call.kv_heads, 0, call.tokens};
  const Batch on_device = lay_out(stream, call, batch, all, carve_starts(layout, call, batch));
  features(stream, call, on_device, to);
}

}  // namespace moba::cuda
