// Inverts the selection, range by range: count, prefix sum, stable scatter.
#include <bit>
#include <limits>
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

/// Rows that cost as much as packing a block's keys and values for a range.
constexpr std::int64_t kPackingRows = 32;
/// Ranges per thread from which it does not matter whether the last round of the threads is full; and ranges
/// per thread that calls of few rows may have beside those of kDenseRows.
constexpr std::int64_t kManyRanges = 16, kShortRanges = 4;

std::int64_t blocks_of_longest(const Call& call) {
  return (call.max_seqlen_k + call.routing.block_size - 1) / call.routing.block_size;
}

/// Most ranges that a plan has, unless the scratch budget forces shorter ones.
std::int64_t max_ranges(const Call& call, const WorkSlice& slice, int threads) {
  const std::int64_t rows = slice.heads() * slice.tokens() * call.heads_per_kv;
  return rows / kDenseRows + slice.heads() * (static_cast<std::int64_t>(call.sequences.size()) + 1) +
         kShortRanges * threads;
}

/// Most rows of a range: enough for kRowsPerBlock, within the scratch budget.
std::int64_t max_range_rows(const Call& call, const SliceSelection& selection, const Context& context) {
  std::int64_t rows = kDenseRows;
  if (call.is_routed()) rows = std::max(rows, kRowsPerBlock * blocks_of_longest(call) / call.width());

  const int threads = context.parallel.threads;
  const std::size_t taken = context.scratch.held() + plan_bytes(call, selection.slice, threads);
  const std::size_t left = context.budget > taken ? context.budget - taken : 0;
  const std::size_t fixed = attend_bytes(call, 0);
  const std::size_t per_row = (attend_bytes(call, kDenseRows) - fixed) / kDenseRows + 1;
  const std::size_t each = left / static_cast<std::size_t>(threads);
  const auto affordable = static_cast<std::int64_t>(each > fixed ? (each - fixed) / per_row : 0);
  return std::max(std::min(rows, affordable), min_range_rows(call));
}

/// Returns the queries of a range. Of the lengths that max_range_rows() allows it takes the one with which
/// the threads finish first, if every row costs the same: with few ranges, such as those of a short chunk of
/// a prompt, threads would otherwise wait for the last one.
std::int64_t range_queries(const Call& call, const SliceSelection& selection, const Context& context) {
  const WorkSlice& slice = selection.slice;
  std::int64_t longest = 1;
  for (const SequenceView& s : call.sequences) {
    const auto [first, last] = slice.queries_of(s);
    longest = std::max(longest, last - first);
  }
  const auto ranges_with = [&](std::int64_t queries) {
    std::int64_t ranges = 0;
    for (const SequenceView& s : call.sequences) {
      const auto [first, last] = slice.queries_of(s);
      ranges += (last - first + queries - 1) / queries * slice.heads();
    }
    return ranges;
  };
  const std::int64_t threads = context.parallel.threads;
  const std::int64_t packing_rows = kPackingRows * blocks_of_longest(call) / (call.width() + 1);
  const std::int64_t most =
      std::max<std::int64_t>(max_range_rows(call, selection, context) / call.heads_per_kv, 1);
  const std::int64_t cuts = (longest + most - 1) / most;
  std::int64_t best = most, best_cost = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t more = 0; more <= kShortRanges * threads; ++more) {
    const std::int64_t queries = (longest + cuts + more - 1) / (cuts + more), ranges = ranges_with(queries);
    if (more > 0 && (queries * call.heads_per_kv < kMinRows ||
                     ranges > max_ranges(call, slice, static_cast<int>(threads))))
      break;
    const std::int64_t cost = (ranges + threads - 1) / threads * (queries * call.heads_per_kv + packing_rows);
    if (cost < best_cost) {
      best = queries;
      best_cost = cost;
    }
    if (ranges >= kManyRanges * threads) break;
  }
  return best;
}

void invert(const Call& call, const SliceSelection& selection, const Range& range, std::uint32_t* offsets,
            std::uint32_t* rows) {
  const SequenceView& s = call.sequences[static_cast<std::size_t>(range.sequence)];
  const std::int64_t blocks = call.blocks(s), width = call.listed_width();
  // Query heads that share a row of the selection are listed together.
  const std::int64_t shared = std::gcd(call.heads_per_kv, selection.rows.heads_per_row);
  // A row is over where its own block or the padding begins: no routed block follows either.
  const auto for_each_entry = [&](auto&& visit) {
    std::uint32_t row = 0;
    for (std::int64_t query = range.q0; query < range.q1; ++query) {
      const auto own = static_cast<std::int32_t>(call.routing.causal ? call.own_block(s, query) : blocks);
      for (std::int64_t g = 0; g < call.heads_per_kv; g += shared) {
        const std::int32_t* selected = selection.of(range.head * call.heads_per_kv + g, s.q_begin + query);
        for (std::int64_t i = 0; i < width && selected[i] >= 0 && selected[i] < own; ++i)
          visit(selected[i], row);
        row += static_cast<std::uint32_t>(shared);
      }
    }
  };
  const auto rows_of_entry = static_cast<std::uint32_t>(shared);
  std::fill(offsets, offsets + blocks + 1, 0);
  for_each_entry([&](std::int32_t block, std::uint32_t /*row*/) { offsets[block + 1] += rows_of_entry; });
  std::partial_sum(offsets, offsets + blocks + 1, offsets);
  for_each_entry([&](std::int32_t block, std::uint32_t row) {
    std::uint32_t& offset = offsets[block];
    for (std::uint32_t i = 0; i < rows_of_entry; ++i) rows[offset++] = row + i;
  });
  // The scatter moved every offset to the next one's place.
  std::copy_backward(offsets, offsets + blocks, offsets + blocks + 1);
  offsets[0] = 0;
}

}  // namespace

std::int64_t min_range_rows(const Call& call) {
  return std::max(kMinRows, call.heads_per_kv);
}

std::size_t plan_bytes(const Call& call, const WorkSlice& slice, int threads) {
  const std::int64_t width = call.listed_width();
  if (width == 0) return 0;
  const std::int64_t rows = slice.heads() * slice.tokens() * call.heads_per_kv;
  return static_cast<std::size_t>(rows * width +
                                  max_ranges(call, slice, threads) * (blocks_of_longest(call) + 2)) *
         sizeof(std::uint32_t);
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

Plan build_plan(const Call& call, const SliceSelection& selection, PlanBuilder builder, Context& context) {
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

Plan plan(const Call& call, const SliceSelection& selection, Context& context) {
  const WorkSlice& slice = selection.slice;
  const std::int64_t step = range_queries(call, selection, context);
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

Plan plan_backward(const Call& call, const SliceSelection& selection, Context& context) {
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
