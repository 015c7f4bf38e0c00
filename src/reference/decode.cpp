// Decode is the gate and attention of a forward call for one query per sequence, on centroids that the cache
// keeps.
#include "reference/stages.h"

namespace moba::reference {

void decode(const Problem& problem, const Means& means, const Outputs& outputs, Context& context) {
  const WorkSlice all{0, problem.kv_heads, 0, problem.tokens};
  attend(problem, gate(problem, means, all, context), {}, outputs, context);
}

}  // namespace moba::reference
