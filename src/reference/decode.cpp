// Decode is the gate and attention of a forward call for one query per sequence, on centroids that the cache
// keeps.
#include "reference/stages.h"

namespace moba::reference {

void decode(const Call& call, const BlockMeans& means, const Outputs& outputs, Context& context) {
  const WorkSlice all{0, call.kv_heads, 0, call.tokens};
  attend(call, gate(call, means, all, context), {}, outputs, context);
}

}  // namespace moba::reference
