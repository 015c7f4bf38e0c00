#include "cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

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

/// Covers several partitions, a block selected by every row, blocks selected by none, and rows with fewer
/// selections than others.
TEST(Plan, ListsTheRowsOfEveryBlockInOrder) {
  Case c{.dtype = DType::f16, .kv_heads = 2, .heads_per_kv = 2, .head_dim = 64};
  c.sequences = {{0, 3, 703}, {0, 40, 740}};
  c.routing = {.block_size = 20, .top_k = 5};
  test::fill(c);
  const DeviceBatch starts = batch_of(c.sequences);
  test::Mirror mirror;
  const auto placed = [&](const test::Array& array) { return mirror.read(on_device(array.view())); };
  const DeviceCall call = make_call(placed(c.q), placed(c.k), placed(c.v), starts, c.routing);
  const WorkSlice slice{0, 2, 1, call.tokens};
  const std::int64_t rows = call.rows(slice), choices = rows * call.width();
  const std::int64_t stride = call.selection_width;
  std::vector<std::int32_t> selection(static_cast<std::size_t>(call.q_heads * slice.tokens() * stride), -1);
  const SelectionRows selected = rows_in(selection.data(), call, slice, stride);
  std::map<std::pair<std::int64_t, std::int32_t>, std::vector<std::uint32_t>> expected;
  for (std::int64_t head = 0; head < 2; ++head) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t token = slice.token0 + row / call.heads_per_kv;
      const bool is_first = token < 3;
      const std::int64_t own = (is_first ? token + 37 : token - 3) / 20;
      std::int32_t* to = selected.of(head * call.heads_per_kv + row % call.heads_per_kv, token);
      std::int32_t block = 0;
      for (std::int64_t w = 0; w < call.width() && block < own;
           ++w, block += 1 + static_cast<std::int32_t>((row * 7 + w + head) % 5)) {
        if (!is_first && row % 9 == 0 && w == 2) break;
        *to++ = block;
        expected[{head, block + (is_first ? 0 : 2)}].push_back(
            static_cast<std::uint32_t>(row * call.ranks() + w));
      }
      *to = static_cast<std::int32_t>(own);
    }
  }

  ArenaLayout measure;
  carve_starts(measure, call, starts);
  carve_plan(measure, call, slice);
  const Execution execution;  // the stream refers to it
  Stream stream(execution);
  const Arena arena(stream, measure.used());
  ArenaLayout layout(arena.data());
  const Batch batch = lay_out(stream, call, starts, slice, carve_starts(layout, call, starts));
  const Plan plan = carve_plan(layout, call, slice);
  cuda::plan(stream, call, slice, batch,
             rows_in(mirror.read(selection.data(), static_cast<std::int64_t>(selection.size())), call, slice,
                     stride),
             plan);

  for (std::int64_t head = 0; head < 2; ++head) {
    const std::uint32_t* offsets = plan.offsets + head * (call.max_blocks() + 1);
    std::vector<std::uint32_t> all;
    for (std::int32_t block = 0; block < batch.block_starts[2]; ++block) {
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

}  // namespace
}  // namespace moba::cuda
