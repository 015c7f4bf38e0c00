// One query a sequence: the gate and attention of a forward call, on means that the cache has kept.
#include "reference/stages.h"

namespace moba::reference {

void decode(const Problem& problem, const Means& means, const Outputs& outputs, Resources& resources) {
  const Group everything{0, problem.kv_heads, 0, problem.tokens};
  attend(problem, gate(problem, means, everything, resources), {}, outputs, resources);
}

}  // namespace moba::reference
