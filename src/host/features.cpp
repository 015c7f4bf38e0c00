#include "host/flow.h"
#include "host/run.h"

namespace moba::host {

/// Every feature of a block in one pass over its keys.
void features(const Call& call, const BlockFeatures& features, const Execution& execution) {
  Run(call, execution).features(features);
}

}  // namespace moba::host
