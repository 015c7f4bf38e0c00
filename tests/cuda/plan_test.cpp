#include "cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>

#include "device_case.h"
#include "mirror.h"
#include "selection.h"

namespace moba::cuda {
namespace {

using test::Case;
using test::on_device;

/// Returns the entries of one head in `tiles`: those of full tiles or of the blocks' remainders.
std::vector<std::uint32_t> entries_of(const Plan& plan, const RoutedTile* tiles, int total, std::int64_t head,
                                      std::int64_t choices) {
  std::vector<std::uint32_t> entries;
  for (std::uint32_t i = 0; i < plan.totals[total]; ++i) {
    EXPECT_LE(tiles[i].count, static_cast<std::uint32_t>(kTileRows));
    if (tiles[i].head != head) continue;
    const std::uint32_t* first = plan.entries + head * choices + tiles[i].first;
    entries.insert(entries.end(), first, first + tiles[i].count);
  }
  return entries;
}

/// Entries of every head and packed block, ascending.
using Lists = std::map<std::pair<std::int64_t, std::int32_t>, std::vector<std::uint32_t>>;

/// Writes rows of a slice that select random blocks: the first block always, and fewer than `width` now and
/// then. The rows also hold what the plan has to ignore: their own blocks, and numbers that are no block of
/// theirs.
Lists write_rows(const DeviceCall& call, const Sequences& sequences, const WorkSlice& slice,
                 const SelectionRows& selected) {
  std::mt19937 random(1);
  Lists lists;
  for (std::int64_t head = slice.head0; head < slice.head1; ++head) {
    for (std::int64_t row = 0; row < call.rows(slice); ++row) {
      const std::int64_t token = slice.token0 + row / call.heads_per_kv;
      std::int64_t s = 0, first_block = 0;
      const auto keys = [&] { return sequences.cu_seqlens_k[s + 1] - sequences.cu_seqlens_k[s]; };
      for (; sequences.cu_seqlens_q[s + 1] <= token; ++s)
        first_block += divide_up(keys(), call.routing.block_size);
      const std::int64_t blocks = divide_up(keys(), call.routing.block_size),
                         position = token + keys() - sequences.cu_seqlens_q[s + 1],
                         own = position < 0 ? 0 : position / call.routing.block_size,
                         end = call.routing.causal ? own : blocks;
      std::int32_t* to = selected.of(head * call.heads_per_kv + row % call.heads_per_kv, token);
      const std::int32_t* const last = to + call.width();
      std::int64_t block = 0;
      for (std::int64_t rank = 0; block < end && to < last && random() % 16 != 0; ++rank) {
        *to++ = static_cast<std::int32_t>(block);
        lists[{head - slice.head0, static_cast<std::int32_t>(first_block + block)}].push_back(
            static_cast<std::uint32_t>(row * call.ranks() + rank));
        block += 1 + random() % (2 * divide_up(blocks, call.width()));
      }
      const std::array<std::int64_t, 4> ignored{call.routing.causal ? own : blocks, blocks, -2, 0x7FFFFFFF};
      for (std::size_t i = 0; to < last && i < ignored.size(); ++i)
        *to++ = static_cast<std::int32_t>(ignored[i]);
    }
  }
  return lists;
}

void check_plan(Case c, WorkSlice slice) {
  c.dtype = DType::f16;
  c.head_dim = 64;
  test::fill(c);
  const DeviceBatch starts = batch_of(c.sequences);
  test::Mirror mirror;
  const auto placed = [&](const test::Array& array) { return mirror.read(on_device(array.view())); };
  const DeviceCall call = make_call(placed(c.q), placed(c.k), placed(c.v), starts, c.routing);
  slice.token1 = std::min(slice.token1, call.tokens);
  const std::int64_t choices = call.rows(slice) * call.width(), stride = call.selection_width;
  std::vector<std::int32_t> selection(static_cast<std::size_t>(slice.heads() * call.rows(slice) * stride),
                                      -1);
  Lists expected = write_rows(call, c.sequences, slice, rows_in(selection.data(), call, slice, stride));

  ArenaLayout measure;
  carve_starts(measure, call, starts);
  carve_plan(measure, call, slice);
  const Execution execution;  // the stream refers to it
  Stream stream(execution);
  const Arena arena(stream, measure.used());
  std::fill_n(arena.data(), measure.used(), std::byte{0x5A});
  ArenaLayout layout(arena.data());
  const Batch batch = lay_out(stream, call, starts, slice, carve_starts(layout, call, starts));
  const Plan plan = carve_plan(layout, call, slice);
  cuda::plan(stream, call, slice, batch,
             rows_in(mirror.read(selection.data(), static_cast<std::int64_t>(selection.size())), call, slice,
                     stride),
             plan);

  for (std::int64_t head = 0; head < slice.heads(); ++head) {
    const std::uint32_t* offsets = plan.offsets + head * (call.max_blocks() + 1);
    std::vector<std::uint32_t> all;
    for (std::int32_t block = 0; block < batch.block_starts[batch.sequences]; ++block) {
      const std::uint32_t* entries = plan.entries + head * choices;
      const std::vector<std::uint32_t> found(entries + offsets[block], entries + offsets[block + 1]);
      const std::vector<std::uint32_t> wanted = expected[{head, block}];
      ASSERT_EQ(found, wanted) << "head " << head << ", block " << block;
      all.insert(all.end(), found.begin(), found.end());
    }
    std::vector<std::uint32_t> worked = entries_of(plan, plan.full, Plan::kFull, head, choices);
    EXPECT_EQ(worked.size() % kTileRows, 0U);
    const std::vector<std::uint32_t> rest = entries_of(plan, plan.partial, Plan::kPartial, head, choices);
    worked.insert(worked.end(), rest.begin(), rest.end());
    std::sort(worked.begin(), worked.end());
    std::sort(all.begin(), all.end());
    EXPECT_EQ(worked, all);
  }
}

/// Sequences of as many queries as keys, or with `before` keys before the first query.
Sequences sequences_of(const std::vector<std::int32_t>& queries, std::int32_t before = 0) {
  Sequences sequences{{0}, {0}};
  for (const std::int32_t count : queries) {
    sequences.cu_seqlens_q.push_back(sequences.cu_seqlens_q.back() + count);
    sequences.cu_seqlens_k.push_back(sequences.cu_seqlens_k.back() + count + before);
  }
  return sequences;
}

TEST(Plan, ListsTheRowsOfEveryBlockInOrder) {
  for (const bool causal : {true, false}) {
    check_plan({.kv_heads = 2,
                .heads_per_kv = 2,
                .sequences = sequences_of({3, 700}, 37),
                .routing = {.block_size = 20, .top_k = 5, .causal = causal}},
               {0, 2, 1, 703});
  }
}

TEST(Plan, ListsSeveralPartitions) {
  check_plan(
      {.heads_per_kv = 3, .sequences = sequences_of({2500}), .routing = {.block_size = 16, .top_k = 8}},
      {0, 1, 0, 2500});
  // One selection a row, and a slice whose first row is inside a sequence.
  check_plan({.kv_heads = 2, .sequences = sequences_of({10000}), .routing = {.block_size = 1000, .top_k = 2}},
             {1, 2, 333, 9999});
}

TEST(Plan, ListsManyShortSequences) {
  std::vector<std::int32_t> queries;
  for (std::int32_t i = 0; i < 300; ++i) queries.push_back(i * 7 % 41);
  check_plan(
      {.heads_per_kv = 5, .sequences = sequences_of(queries), .routing = {.block_size = 4, .top_k = 3}},
      {0, 1, 100, 5000});
}

/// More blocks than the shared memory of a thread block counts, and rows whose blocks are on both sides.
TEST(Plan, ListsMoreBlocksThanAWindow) {
  check_plan({.sequences = sequences_of({3000, 5000}, 12000), .routing = {.block_size = 1, .top_k = 6}},
             {0, 1, 0, 8000});
}

TEST(Plan, EmptyRowsHaveEmptyLists) {
  check_plan({.sequences = {{0, 0}, {0, 100}}, .routing = {.block_size = 10, .top_k = 3}}, {0, 1, 0, 0});
}

}  // namespace
}  // namespace moba::cuda
