#include "host/flow.h"
#include "host/run.h"
#include "selection.h"

namespace moba::host {

/// Gate over the cached means, or the caller's selection, and attention inside the selected blocks, in one
/// operation of the backend.
void decode(const Call& call, const BlockMeans& means, const Outputs& outputs, const Execution& execution) {
  check_selection(call);
  Run(call, execution).decode(means, outputs);
}

}  // namespace moba::host
