#include "host/run.h"

#include <algorithm>

#include "errors.h"
#include "number.h"
#include "selection.h"
#include "split.h"
#include "stopwatch.h"

namespace moba::host {
namespace {

/// Returns `parallel` with loops that skip their tasks once the call is cancelled, and then throw.
Parallel cancellable(const Parallel& parallel, Cancel& cancelled) {
  if (!cancelled.can_happen()) return parallel;
  return {parallel.threads, [parallel, &cancelled](std::int64_t tasks, const Parallel::Body& body) {
            parallel.run(tasks, [&](std::int64_t task, int worker) {
              if (!cancelled()) body(task, worker);
            });
            if (cancelled()) throw Cancellation{};
          }};
}

void store_row(const float* row, const Tensor& to, std::int64_t token, std::int64_t head) {
  if (to.data == nullptr) return;
  const std::int64_t offset = token * to.strides[0] + head * to.strides[1];
  for (std::int64_t d = 0; d < to.sizes[2]; ++d) store(to.data, to.dtype, offset + d, row[d]);
}

}  // namespace

Run::Run(const Call& call, const Execution& execution)
    : call_(call),
      execution_(execution),
      backend_(choose_backend(execution.backend, call)),
      cancelled_(execution.cancelled),
      parallel_(cancellable(threads_of(execution), cancelled_)),
      scratch_(execution.scratch),
      context_{parallel_, scratch_, execution.workspace_bytes.value_or(kHostWorkspace), cancelled_} {}

Run::~Run() {
  if (execution_.profile == nullptr) return;
  Profile& total = *execution_.profile;
  total.centroids += profile_.centroids;
  total.gate += profile_.gate;
  total.plan += profile_.plan;
  total.attend += profile_.attend;
  total.workspace_bytes = std::max(total.workspace_bytes, scratch_.peak());
}

template <typename Stage>
auto Run::timed(double Profile::*seconds, Stage&& stage) {
  const ScopedTimer timer(profile_.*seconds);
  return stage();
}

std::vector<WorkSlice> Run::forward_slices() const {
  if (call_.tokens == 0) return {};
  return split_within(context_.budget, call_.kv_heads, call_.tokens, [&](const WorkSlice& slice) {
    return backend_.workspace(call_, slice, parallel_.threads);
  });
}

std::vector<WorkSlice> Run::backward_slices() const {
  return split_heads_within(context_.budget, call_.kv_heads, call_.tokens, [&](const WorkSlice& slice) {
    return backend_.workspace_backward(call_, slice, parallel_.threads);
  });
}

BlockMeans Run::centroids(const WorkSlice& slice) {
  if (!call_.needs_scores()) return {};
  return timed(&Profile::centroids,
               [&] { return backend_.centroids(call_, slice.head0, slice.head1, context_); });
}

BlockMeans Run::centroids() {
  return timed(&Profile::centroids, [&] { return backend_.centroids(call_, 0, call_.kv_heads, context_); });
}

SliceSelection Run::gate(const BlockMeans& means, const WorkSlice& slice, const Outputs& outputs) {
  return timed(&Profile::gate, [&] {
    if (call_.is_selected()) return SliceSelection{slice, selected_rows(call_), {}};
    const bool is_given = outputs.selection != nullptr;
    if (!call_.needs_scores()) {
      if (is_given) write_unscored_selection(call_, {slice, rows_in(outputs, call_), {}});
      return new_selection(call_, slice, scratch_);
    }
    SliceSelection selection =
        is_given ? SliceSelection{slice, rows_in(outputs, call_), {}} : new_selection(call_, slice, scratch_);
    backend_.gate(call_, means, selection, context_);
    return selection;
  });
}

Plan Run::plan(const SliceSelection& selection) {
  return timed(&Profile::plan, [&] { return backend_.plan(call_, selection, context_); });
}

void Run::attend(const SliceSelection& selection, const Plan& plan, const Outputs& outputs) {
  timed(&Profile::attend, [&] { backend_.attend(call_, selection, plan, outputs, context_); });
}

Plan Run::plan_backward(const SliceSelection& selection) {
  return timed(&Profile::plan, [&] { return backend_.plan_backward(call_, selection, context_); });
}

void Run::attend_backward(const SliceSelection& selection, const Plan& plan, const Backward& backward) {
  timed(&Profile::attend, [&] { backend_.attend_backward(call_, selection, plan, backward, context_); });
}

void Run::features(const BlockFeatures& to) {
  timed(&Profile::centroids, [&] {
    const Buffer<float> memory(scratch_, 3 * parallel_.threads * call_.head_dim);
    std::int64_t first = 0;  // among the blocks of all sequences
    for (const SequenceView& s : call_.sequences) {
      const std::int64_t blocks = call_.blocks(s);
      parallel_.run(blocks * call_.kv_heads, [&](std::int64_t task, int worker) {
        const std::int64_t block = task / call_.kv_heads, head = task % call_.kv_heads;
        float* mean = memory.data() + 3 * worker * call_.head_dim;
        const FeatureRows rows{mean, to.max.data == nullptr ? nullptr : mean + call_.head_dim,
                               to.min.data == nullptr ? nullptr : mean + 2 * call_.head_dim};
        backend_.features(call_, s, head, block, rows);
        store_row(rows.mean, to.mean, first + block, head);
        store_row(rows.max, to.max, first + block, head);
        store_row(rows.min, to.min, first + block, head);
      });
      first += blocks;
    }
  });
}

void Run::decode(const BlockMeans& means, const Outputs& outputs) {
  timed(&Profile::attend, [&] { backend_.decode(call_, means, outputs, context_); });
}

}  // namespace moba::host
