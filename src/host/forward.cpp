#include "host/flow.h"
#include "host/run.h"

namespace moba::host {

/// Average the keys of each block, score every query against those averages and keep the best, invert the
/// selection, attend inside the selected blocks.
void forward(const Call& call, const BlockMeans* cached, const Outputs& outputs, const Execution& execution) {
  Run run(call, execution);
  BlockMeans means;
  for (const WorkSlice& slice : run.forward_slices()) {
    if (cached == nullptr && slice.token0 == 0) {
      means = {};  // frees the means of the previous heads
      means = run.centroids(slice);
    }
    const Selection selection = run.gate(cached == nullptr ? means : *cached, slice, outputs);
    if (outputs.out.data == nullptr) continue;

    const Plan plan = run.plan(selection);
    run.attend(selection, plan, outputs);
  }
}

}  // namespace moba::host
