#include "host/flow.h"
#include "host/run.h"
#include "selection.h"

namespace moba::host {

/// Reads the selection of the forward pass or the caller's, or selects again to the same blocks, inverts it
/// and attends backwards.
void backward(const Call& call, const Tensor& d_out, const Saved& saved, const Gradients& gradients,
              const Execution& execution) {
  check_selection(call);
  check_selection(call, saved);
  const bool is_saved = saved.selection != nullptr && call.needs_scores();
  Run run(call, execution);
  const Backward backward{d_out, saved.out, saved.lse, gradients};
  for (const WorkSlice& slice : run.backward_slices()) {
    const SliceSelection selection =
        is_saved ? SliceSelection{slice, rows_in(saved, call), {}} : run.gate(run.centroids(slice), slice);
    const Plan plan = run.plan_backward(selection);
    run.attend_backward(selection, plan, backward);
  }
}

}  // namespace moba::host
