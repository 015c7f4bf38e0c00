#include <numeric>

#include "reference/rows.h"
#include "reference/stages.h"

namespace moba::reference {
namespace {

/// Inverts the selection by count, prefix sum and stable scatter: for each block, the rows that selected it,
/// ascending.
void invert(const Call& call, const SliceSelection& selection, const Range& range, std::uint32_t* offsets,
            std::uint32_t* rows) {
  const SequenceView& s = call.sequences[static_cast<std::size_t>(range.sequence)];
  const std::int64_t blocks = call.blocks(s), group = call.heads_per_kv;
  const auto for_each_entry = [&](auto&& visit) {
    for (std::int64_t row = 0; row < (range.q1 - range.q0) * group; ++row) {
      const std::int64_t query = range.q0 + row / group;
      for_each_scored_block(call, selection, s, query, range.head * group + row % group,
                            [&](std::int64_t block) { visit(block, static_cast<std::uint32_t>(row)); });
    }
  };
  std::fill_n(offsets, blocks + 1, 0);
  for_each_entry([&](std::int64_t block, std::uint32_t /*row*/) { ++offsets[block + 1]; });
  std::partial_sum(offsets, offsets + blocks + 1, offsets);
  for_each_entry([&](std::int64_t block, std::uint32_t row) { rows[offsets[block]++] = row; });
  // The scatter has moved every offset to where the next begins.
  std::copy_backward(offsets, offsets + blocks, offsets + blocks + 1);
  offsets[0] = 0;
}

/// One range for every (sequence, kv head) of the slice, those without queries included: the gradients of
/// their keys are 0.
void list_ranges(const Call& call, const WorkSlice& slice, Plan& plan, std::int64_t& offsets,
                 std::int64_t& rows) {
  for (std::size_t index = 0; index < call.sequences.size(); ++index) {
    const SequenceView& s = call.sequences[index];
    const auto [first, last] = slice.queries_of(s);
    for (std::int64_t head = slice.head0; head < slice.head1; ++head) {
      plan.ranges.push_back({static_cast<std::int64_t>(index), head, first, last, offsets, rows});
      offsets += call.blocks(s) + 1;
      rows += (last - first) * call.heads_per_kv * call.listed_width();
    }
  }
}

}  // namespace

std::size_t plan_bytes(const Call& call, const WorkSlice& slice) {
  std::int64_t blocks = 0;
  for (const SequenceView& s : call.sequences) blocks += call.blocks(s) + 1;
  const std::int64_t rows = slice.heads() * slice.tokens() * call.heads_per_kv * call.listed_width();
  return static_cast<std::size_t>(rows + blocks * slice.heads()) * sizeof(std::uint32_t);
}

Plan plan(const Call& call, const SliceSelection& selection, Context& context) {
  Plan plan;
  std::int64_t offsets = 0, rows = 0;
  list_ranges(call, selection.slice, plan, offsets, rows);
  plan.offsets = Buffer<std::uint32_t>(context.scratch, offsets);
  plan.rows = Buffer<std::uint32_t>(context.scratch, rows);
  context.parallel.run(static_cast<std::int64_t>(plan.ranges.size()), [&](std::int64_t task, int) {
    const Range& range = plan.ranges[static_cast<std::size_t>(task)];
    invert(call, selection, range, plan.offsets.data() + range.first_offset,
           plan.rows.data() + range.first_row);
  });
  return plan;
}

}  // namespace moba::reference
