// Decode is the gate and attention of a forward call for one query per sequence, on centroids that the cache
// keeps.
#include "reference/stages.h"
#include "selection.h"

namespace moba::reference {

void decode(const Call& call, const BlockMeans& means, const Outputs& outputs, Context& context) {
  const WorkSlice all{0, call.kv_heads, 0, call.tokens};
  const SliceSelection selection = call.is_selected() ? SliceSelection{all, selected_rows(call), {}}
                                                      : new_selection(call, all, context.scratch);
  if (call.needs_scores()) gate(call, means, selection, context);
  attend(call, selection, {}, outputs, context);
}

}  // namespace moba::reference
