#include "host/flow.h"
#include "host/run.h"
#include "selection.h"

namespace moba::host {

/// Average the keys of each block, score every query against those averages and keep the best, or take the
/// caller's selection; invert it, attend inside the selected blocks.
void forward(const Call& call, const BlockMeans* cached, const Outputs& outputs, const Execution& execution) {
  check_selection(call);
  Run run(call, execution);
  BlockMeans means;
  for (const WorkSlice& slice : run.forward_slices()) {
    if (cached == nullptr && slice.token0 == 0) {
      means = {};  // frees the means of the previous heads
      means = run.centroids(slice);
    }
    const SliceSelection selection = run.gate(cached == nullptr ? means : *cached, slice, outputs);
    if (outputs.out.data == nullptr) continue;

    const Plan plan = run.plan(selection);
    run.attend(selection, plan, outputs);
  }
}

}  // namespace moba::host
