#include <numeric>

#include "reference/rows.h"
#include "reference/stages.h"

namespace moba::reference {
namespace {

/// Inverts the selection by count, prefix sum and stable scatter: for each block, the rows that selected it,
/// ascending.
void invert(const Selection& selection, const Range& range, const std::int32_t* selected, std::int64_t blocks,
            std::uint32_t* offsets, std::uint32_t* rows) {
  const std::int64_t count = (range.q1 - range.q0) * selection.query_group, width = selection.width;
  std::fill_n(offsets, blocks + 1, 0);
  for (std::int64_t i = 0; i < count * width; ++i) {
    if (selected[i] >= 0) ++offsets[selected[i] + 1];
  }
  std::partial_sum(offsets, offsets + blocks + 1, offsets);
  for (std::int64_t i = 0; i < count * width; ++i) {
    if (selected[i] >= 0) rows[offsets[selected[i]]++] = static_cast<std::uint32_t>(i / width);
  }
  // The scatter has moved every offset to where the next begins.
  std::copy_backward(offsets, offsets + blocks, offsets + blocks + 1);
  offsets[0] = 0;
}

/// One range for every (sequence, kv head) of the slice, those without queries included: the gradients of
/// their keys are 0.
void list_ranges(const Call& call, const Selection& selection, Plan& plan, std::int64_t& offsets,
                 std::int64_t& rows) {
  const WorkSlice& slice = selection.slice;
  for (std::size_t index = 0; index < call.sequences.size(); ++index) {
    const SequenceView& s = call.sequences[index];
    const auto [first, last] = slice.queries_of(s);
    for (std::int64_t head = slice.head0; head < slice.head1; ++head) {
      plan.ranges.push_back({static_cast<std::int64_t>(index), head, first, last, offsets, rows});
      offsets += call.blocks(s) + 1;
      rows += (last - first) * call.heads_per_kv * selection.width;
    }
  }
}

}  // namespace

std::size_t plan_bytes(const Call& call, const WorkSlice& slice) {
  std::int64_t blocks = 0;
  for (const SequenceView& s : call.sequences) blocks += call.blocks(s) + 1;
  return selection_bytes(call, slice) +
         static_cast<std::size_t>(blocks * slice.heads()) * sizeof(std::uint32_t);
}

Plan plan(const Call& call, const Selection& selection, Context& context) {
  Plan plan;
  std::int64_t offsets = 0, rows = 0;
  list_ranges(call, selection, plan, offsets, rows);
  plan.offsets = Buffer<std::uint32_t>(context.scratch, offsets);
  plan.rows = Buffer<std::uint32_t>(context.scratch, rows);
  context.parallel.run(static_cast<std::int64_t>(plan.ranges.size()), [&](std::int64_t task, int) {
    const Range& range = plan.ranges[static_cast<std::size_t>(task)];
    const SequenceView& s = call.sequences[static_cast<std::size_t>(range.sequence)];
    invert(selection, range, selection.of(range.head, s.q_begin + range.q0), call.blocks(s),
           plan.offsets.data() + range.first_offset, plan.rows.data() + range.first_row);
  });
  return plan;
}

}  // namespace moba::reference
