// Index arithmetic at 10 million tokens and 64 heads, far past 32 bits.
#include "cuda/geometry.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

#include "cuda/divisor.h"

namespace moba::cuda {
namespace {

constexpr std::int64_t kTokens = 10'000'000, kHeads = 64, kDim = 256;

TEST(Geometry, RowOffsetsExceed32Bits) {
  auto* const base = reinterpret_cast<bfloat16*>(std::uintptr_t{1} << 20);
  const View<bfloat16> view{base, kHeads * kDim, kDim};
  EXPECT_EQ(view.row(kTokens - 1, kHeads - 1) - base, kTokens * kHeads * kDim - kDim);
}

TEST(Geometry, MeanAndSlotOffsetsExceed32Bits) {
  const std::int64_t blocks = kTokens / 16, rows = kTokens * 4, ranks = 12;
  EXPECT_EQ(mean_offset(kHeads - 1, blocks, blocks - 1, kDim), (kHeads * blocks - 1) * kDim);
  const auto last = static_cast<std::uint32_t>(rows * ranks - 1);
  EXPECT_EQ(slot_at(kHeads - 1, rows, ranks, last), kHeads * rows * ranks - 1);
}

TEST(Geometry, PageOffsetsExceed32Bits) {
  auto* const base = reinterpret_cast<bfloat16*>(std::uintptr_t{1} << 20);
  constexpr std::int32_t kPage = 16, kLast = kTokens / kPage - 1;
  constexpr std::int64_t kRow = kHeads * kDim, kPages = kTokens / kPage;
  const std::array<std::int32_t, 1> table{kLast};
  const Pages<bfloat16> paged{base, kPage * kRow, kRow, kDim, kPage, table.data(), 0};
  EXPECT_EQ(paged.row(0, kPage - 1, kHeads - 1) - base, kTokens * kRow - kDim);
  // One page per sequence, and its means.
  const Pages<bfloat16> whole{base, kTokens * kRow, kRow, kDim, kTokens, nullptr, 1};
  EXPECT_EQ(whole.row(63, kTokens - 1, kHeads - 1) - base, 64 * kTokens * kRow - kDim);
  const Pages<bfloat16> means{base, kPages * kRow, kRow, kDim, kTokens, nullptr, 1};
  EXPECT_EQ(means.mean(63, kLast, kPage, kHeads - 1) - base, 64 * kPages * kRow - kDim);
}

TEST(Geometry, KeyRangesReachTheLargestInt32) {
  constexpr std::int32_t kKeys = 2'147'483'647;
  const std::int64_t size = (std::int64_t{1} << 30) + 5;
  const KeyRange last = keys_of(1, size, kKeys);
  EXPECT_EQ(last.begin, size);
  EXPECT_EQ(last.end, kKeys);
  EXPECT_EQ(keys_of(2'147'483, 1000, kKeys).end, kKeys);
}

TEST(Geometry, TilesCoverALongSequence) {
  const std::array<std::int32_t, 3> q{0, 3, kTokens + 3}, k{0, 3, kTokens + 3};
  for (const std::int32_t token0 : {0, 1, 5'000'001}) {
    Batch batch{2, q.data(), k.data(), nullptr, nullptr};
    std::array<std::int32_t, 3> tiles{};
    for (std::int32_t s = 0; s < 2; ++s) {
      tiles[static_cast<std::size_t>(s) + 1] =
          tiles[static_cast<std::size_t>(s)] + tiles_of(queries_of(batch, s, token0, kTokens + 3), kHeads);
    }
    batch.tile_starts = tiles.data();
    EXPECT_LE(tiles[2], divide_up((kTokens + 3 - token0) * kHeads, kTileRows) + 3);
    std::int64_t rows = 0;
    for (const std::int32_t index : {0, tiles[1], tiles[1] + 1, tiles[2] - 2, tiles[2] - 1}) {
      const Tile tile = tile_at(batch, index, token0, kTokens + 3, kHeads);
      EXPECT_GT(tile.count, 0);
      EXPECT_LE(tile.count, kTileRows);
      if (index > tiles[1] + 1) {
        EXPECT_EQ(tile.cut, (kTokens * kHeads / kTileRows - (tiles[2] - index)) * kTileRows);
      }
      rows = tile.first_row + tile.count;
    }
    EXPECT_EQ(rows, (kTokens + 3 - token0) * kHeads);
  }
}

TEST(Geometry, DivisorDividesAsTheProcessorDoes) {
  constexpr std::uint32_t kMax = 0x7FFFFFFF;
  std::mt19937 engine(1);
  const auto random = [&] { return static_cast<std::uint32_t>(engine()); };
  for (std::uint32_t i = 0; i < 2000; ++i) {
    const std::uint32_t number = i < 300   ? i + 1
                                 : i < 310 ? kMax - (i - 300)
                                           : (random() & kMax) >> i % 31 | 1;
    const Divisor divisor(number);
    const std::uint32_t multiple = kMax / number * number;
    for (const std::uint32_t n : {0U, number - 1, number, multiple - 1, multiple, kMax, random() & kMax})
      ASSERT_EQ(divisor.quotient(n & kMax), (n & kMax) / number) << n << " / " << number;
  }
}

}  // namespace
}  // namespace moba::cuda
