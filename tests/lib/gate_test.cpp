// Selections that are known without computing a score.
#include <gtest/gtest.h>

#include <limits>

#include "backends.h"
#include "oracle.h"

namespace moba::test {
namespace {

using Blocks = std::vector<std::int32_t>;
using Gate = EveryBackend;

TEST_P(Gate, TopKOfOneSelectsOnlyTheOwnBlock) {
  const Case c = plain_case(1, 50, 50, {.block_size = 8, .top_k = 1});
  const Result result = run_attention(c, execution());
  for (std::int32_t token = 0; token < 50; ++token) EXPECT_EQ(result.row(0, token), Blocks{token / 8});
}

TEST_P(Gate, EqualScoresSelectTheMoreRecentBlock) {
  Case c = plain_case(2, 64, 64, {.block_size = 8, .top_k = 3});
  c.values = Values::equal;
  fill(c);
  const Result result = run_attention(c, execution());
  EXPECT_EQ(result.row(0, 63), (Blocks{5, 6, 7}));
  EXPECT_EQ(result.row(0, 12), (Blocks{0, 1}));
}

TEST_P(Gate, EqualScoresSelectTheMoreRecentBlockAmongMany) {
  Case c = plain_case(2, 1, 3000, {.block_size = 4, .top_k = 6, .sink_blocks = 2});
  c.values = Values::equal;
  fill(c);
  EXPECT_EQ(run_attention(c, execution()).row(0, 0), (Blocks{0, 1, 746, 747, 748, 749}));
}

TEST_P(Gate, NanAndMinusInfinityScoreLowest) {
  Case c = plain_case(3, 40, 40, {.block_size = 8, .top_k = 3});
  for (std::int64_t token = 0; token < 40; ++token) {
    c.q.set(token, 0, 0, 1);
    for (std::int64_t d = 1; d < 16; ++d) c.q.set(token, 0, d, 0);
    c.k.set(token, 0, 0, 0);
  }
  c.k.set(25, 0, 0, std::numeric_limits<double>::quiet_NaN());  // block 3
  c.k.set(17, 0, 0, -std::numeric_limits<double>::infinity());  // block 2
  const Result result = run_attention(c, execution());
  EXPECT_EQ(result.row(0, 39), (Blocks{0, 1, 4}));
  EXPECT_EQ(result.row(0, 31), (Blocks{0, 1, 3}));
}

TEST_P(Gate, NanQueriesSelectTheMostRecentBlocks) {
  Case c = plain_case(4, 40, 40, {.block_size = 4, .top_k = 3});
  c.q.set(39, 0, 5, std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(run_attention(c, execution()).row(0, 39), (Blocks{7, 8, 9}));
}

TEST_P(Gate, SinksCountInTopK) {
  const Case c = plain_case(5, 64, 64, {.block_size = 4, .top_k = 4, .sink_blocks = 3});
  const Result result = run_attention(c, execution());
  EXPECT_EQ(result.row(0, 63), (Blocks{0, 1, 2, 15}));
  EXPECT_EQ(result.row(0, 5), (Blocks{0, 1}));
}

TEST_P(Gate, OwnBlockIsForcedOnlyOnRequest) {
  Case c = plain_case(6, 30, 30, {.block_size = 10, .top_k = 1, .causal = false, .own_block = true});
  Result result = run_attention(c, execution());
  for (std::int32_t token = 0; token < 30; ++token) EXPECT_EQ(result.row(0, token), Blocks{token / 10});

  c.routing.own_block = false;
  result = run_attention(c, execution());
  std::int64_t elsewhere = 0;
  for (std::int32_t token = 0; token < 30; ++token) elsewhere += result.row(0, token) != Blocks{token / 10};
  EXPECT_GT(elsewhere, 0);
}

TEST_P(Gate, RaggedBlockIsAveragedOverItsLength) {
  Case c = plain_case(7, 1, 9, {.block_size = 4, .top_k = 1, .causal = false});
  for (std::int64_t d = 0; d < 16; ++d) {
    c.q.set(0, 0, d, 1);
    for (std::int64_t token = 0; token < 9; ++token) c.k.set(token, 0, d, token == 8 ? 1 : 0.5);
  }
  EXPECT_EQ(run_attention(c, execution()).row(0, 0), Blocks{2});
}

TEST_P(Gate, SelectBlocksMatchesAttention) {
  for (std::uint64_t seed = 3000; seed < 3100; ++seed) {
    const Case c = random_case(seed);
    const Result expected = run_attention(c, execution());
    Result found(c);
    select_blocks(c.q.view(), c.k.view(), c.sequences, c.routing, found.outputs().selection, execution());
    EXPECT_EQ(found.selection, expected.selection) << describe(c);
  }
}

TEST_P(Gate, RowsAreStrideApartAndPadded) {
  for (std::uint64_t seed = 3100; seed < 3160; ++seed) {
    const Case c = random_case(seed);
    Result expected = run_attention(c, execution()), found(c);
    const std::int64_t stride = expected.width + 3, rows = c.q_heads() * c.queries();
    std::vector<std::int32_t> selected(static_cast<std::size_t>(rows * stride + 1), 77), again = selected;
    Outputs outputs = found.outputs();
    outputs.selection = selected.data();
    outputs.selection_stride = stride;
    attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, c.routing, outputs, execution());
    select_blocks(c.q.view(), c.k.view(), c.sequences, c.routing, again.data(), execution(), stride);
    EXPECT_EQ(found.out.bytes(), expected.out.bytes()) << describe(c);
    EXPECT_EQ(again, selected) << describe(c);
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int32_t* blocks = selected.data() + row * stride;
      const std::int32_t* wanted = expected.outputs().selection + row * expected.width;
      ASSERT_TRUE(std::equal(wanted, wanted + expected.width, blocks)) << describe(c) << ", row " << row;
      ASSERT_EQ(std::count(blocks + expected.width, blocks + stride, -1), 3)
          << describe(c) << ", row " << row;
    }
  }
}

TEST_P(Gate, BlocksMayBeLongerThanTheSequence) {
  const Case c = plain_case(8, 20, 20, {.block_size = std::numeric_limits<std::int64_t>::max(), .top_k = 2});
  const Result result = run_attention(c, execution());
  EXPECT_EQ(result.width, 1);
  EXPECT_EQ(result.row(0, 0), Blocks{0});
  check_attended(c, result, exact());
}

MOBA_FOR_EVERY_BACKEND(Gate);

TEST(SelectionWidth, IsBoundedByTheLongestSequence) {
  const Sequences sequences{{0, 5, 5, 105}, {0, 5, 5, 105}};
  EXPECT_EQ(selection_width(sequences, {.block_size = 10, .top_k = 3}), 3);
  EXPECT_EQ(selection_width(sequences, {.block_size = 10, .top_k = 30}), 10);
  EXPECT_EQ(selection_width(sequences, Routing::full()), 1);
  EXPECT_EQ(selection_width(one_sequence(0), {.block_size = 10, .top_k = 3}), 0);
}

}  // namespace
}  // namespace moba::test
