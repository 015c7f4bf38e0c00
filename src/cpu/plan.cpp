// Inverts the selection, range by range: count, prefix sum, stable scatter.
#include <bit>
#include <numeric>

#include "cpu/sizes.h"
#include "cpu/stages.h"

namespace moba::cpu {
namespace {

/// Rows of a range when every row sees every block: running outputs and a key tile of keys and values share
/// the second-level cache.
constexpr std::int64_t kDenseRows = 768;
/// Rows that a block should find in a range, so that packing its keys and values costs little beside the work
/// on them.
constexpr std::int64_t kRowsPerBlock = 320;
constexpr std::int64_t kMinRows = 64;
/// Rows per block in the backward pass, which also reads and writes the gradients of keys and values; and the
/// maximum number of ranges of all heads: enough for many threads, few enough to keep rounds long.
constexpr std::int64_t kRowsPerBackwardTile = 256, kMaxBackwardParts = 16;

/// Rows of a range: long enough for kRowsPerBlock, short enough for the scratch budget and for every thread
/// to have a few.
std::int64_t range_rows(const Call& call, const Selection& selection, const Context& context) {
  const std::int64_t blocks = (call.max_seqlen_k + call.routing.block_size - 1) / call.routing.block_size;
  std::int64_t rows = kDenseRows;
  if (call.needs_scores()) rows = std::max(rows, kRowsPerBlock * blocks / call.width());

  const std::int64_t all = selection.slice.tokens() * selection.slice.heads() * call.heads_per_kv;
  const std::int64_t share = all / (4 * context.parallel.threads);
  rows = std::min(rows, std::max(share, kDenseRows));

  const std::size_t taken = context.scratch.held() + plan_bytes(call, selection.slice);
  const std::size_t left = context.budget > taken ? context.budget - taken : 0;
  const std::size_t fixed = attend_bytes(call, 0);
  const std::size_t per_row = (attend_bytes(call, kDenseRows) - fixed) / kDenseRows + 1;
  const std::size_t each = left / static_cast<std::size_t>(context.parallel.threads);
  const auto affordable = static_cast<std::int64_t>(each > fixed ? (each - fixed) / per_row : 0);
  return std::max(std::min(rows, affordable), min_range_rows(call));
}

void invert(const Call& call, const Selection& selection, const Range& range, std::uint32_t* offsets,
            std::uint32_t* rows) {
  const SequenceView& s = call.sequences[static_cast<std::size_t>(range.sequence)];
  const std::int64_t blocks = call.blocks(s), width = call.listed_width();
  // A row is over where its own block or the padding begins: no routed block follows either.
  const auto for_each_entry = [&](auto&& visit) {
    std::uint32_t row = 0;
    for (std::int64_t query = range.q0; query < range.q1; ++query) {
      const auto own = static_cast<std::int32_t>(call.routing.causal ? call.own_block(s, query) : blocks);
      for (std::int64_t g = 0; g < call.heads_per_kv; ++g, ++row) {
        const std::int32_t* selected = selection.of(range.head * call.heads_per_kv + g, s.q_begin + query);
        for (std::int64_t i = 0; i < width && selected[i] >= 0 && selected[i] < own; ++i)
          visit(selected[i], row);
      }
    }
  };
  std::fill(offsets, offsets + blocks + 1, 0);
  for_each_entry([&](std::int32_t block, std::uint32_t /*row*/) { ++offsets[block + 1]; });
  std::partial_sum(offsets, offsets + blocks + 1, offsets);
  for_each_entry([&](std::int32_t block, std::uint32_t row) { rows[offsets[block]++] = row; });
  // The scatter moved every offset to the next one's place.
  std::copy_backward(offsets, offsets + blocks, offsets + blocks + 1);
  offsets[0] = 0;
}

}  // namespace

std::int64_t min_range_rows(const Call& call) {
  return std::max(kMinRows, call.heads_per_kv);
}

std::size_t plan_bytes(const Call& call, const WorkSlice& slice) {
  const std::int64_t width = call.listed_width();
  if (width == 0) return 0;
  const std::int64_t blocks = (call.max_seqlen_k + call.routing.block_size - 1) / call.routing.block_size;
  const std::int64_t rows = slice.heads() * slice.tokens() * call.heads_per_kv;
  const std::int64_t max_ranges =
      rows / kDenseRows + slice.heads() * (static_cast<std::int64_t>(call.sequences.size()) + 1);
  return static_cast<std::size_t>(rows * width + max_ranges * (blocks + 2)) * sizeof(std::uint32_t);
}

namespace {

/// The ranges of a plan under construction, and the space that their lists take.
struct PlanBuilder {
  Plan plan{};
  std::int64_t offsets = 0, rows = 0;

  void add(const Call& call, std::size_t sequence, std::int64_t head, std::int64_t q0, std::int64_t q1) {
    const auto s = static_cast<std::int64_t>(sequence);
    plan.ranges.push_back({s, head, q0, q1, offsets, rows});
    offsets += call.blocks(call.sequences[sequence]) + 1;
    rows += (q1 - q0) * call.heads_per_kv * call.listed_width();
  }
};

Plan build_plan(const Call& call, const Selection& selection, PlanBuilder builder, Context& context) {
  Plan plan = std::move(builder.plan);
  if (call.listed_width() == 0) return plan;
  plan.offsets = Buffer<std::uint32_t>(context.scratch, builder.offsets);
  plan.rows = Buffer<std::uint32_t>(context.scratch, builder.rows);
  context.parallel.run(static_cast<std::int64_t>(plan.ranges.size()), [&](std::int64_t task, int) {
    const Range& range = plan.ranges[static_cast<std::size_t>(task)];
    invert(call, selection, range, plan.offsets.data() + range.first_offset,
           plan.rows.data() + range.first_row);
  });
  return plan;
}

}  // namespace

Plan plan(const Call& call, const Selection& selection, Context& context) {
  const WorkSlice& slice = selection.slice;
  const std::int64_t step =
      std::max<std::int64_t>(range_rows(call, selection, context) / call.heads_per_kv, 1);
  PlanBuilder builder;
  for (std::size_t s = call.sequences.size(); s-- > 0;) {
    const auto [first, last] = slice.queries_of(call.sequences[s]);
    if (first == last) continue;
    const std::int64_t ranges = (last - first + step - 1) / step;
    // Later queries see more keys and come first, so that no long range is left for the end.
    for (std::int64_t r = ranges - 1; r >= 0; --r) {
      for (std::int64_t head = slice.head0; head < slice.head1; ++head) {
        builder.add(call, s, head, first + (last - first) * r / ranges,
                    first + (last - first) * (r + 1) / ranges);
      }
    }
  }
  return build_plan(call, selection, std::move(builder), context);
}

std::int64_t backward_parts(const Call& call, const SequenceView& sequence) {
  const std::int64_t key_tiles =
      (sequence.keys + static_cast<std::int64_t>(kKeyTileSize) - 1) / static_cast<std::int64_t>(kKeyTileSize);
  const std::int64_t rows = sequence.queries * call.heads_per_kv * (call.listed_width() + 1) /
                            std::max<std::int64_t>(call.blocks(sequence), 1);
  const std::int64_t max_parts =
      std::min({key_tiles, sequence.queries, rows / kRowsPerBackwardTile, kMaxBackwardParts});
  return static_cast<std::int64_t>(
      std::bit_floor(static_cast<std::uint64_t>(std::max<std::int64_t>(max_parts, 1))));
}

Plan plan_backward(const Call& call, const Selection& selection, Context& context) {
  const WorkSlice& slice = selection.slice;
  PlanBuilder builder;
  for (std::size_t s = 0; s < call.sequences.size(); ++s) {
    const SequenceView& sequence = call.sequences[s];
    if (sequence.queries == 0 || sequence.keys == 0) continue;
    const std::int64_t parts = backward_parts(call, sequence);
    for (std::int64_t head = slice.head0; head < slice.head1; ++head) {
      for (std::int64_t part = 0; part < parts; ++part) {
        builder.add(call, s, head, sequence.queries * part / parts, sequence.queries * (part + 1) / parts);
      }
    }
  }
  return build_plan(call, selection, std::move(builder), context);
}

std::size_t plan_backward_bytes(const Call& call, const WorkSlice& slice) {
  const std::int64_t width = call.listed_width();
  if (width == 0) return 0;
  std::int64_t offsets = 0;
  for (const SequenceView& s : call.sequences) offsets += backward_parts(call, s) * (call.blocks(s) + 1);
  const std::int64_t rows = slice.tokens() * call.heads_per_kv * width;
  return static_cast<std::size_t>(slice.heads() * (rows + offsets)) * sizeof(std::uint32_t);
}

}  // namespace moba::cpu
