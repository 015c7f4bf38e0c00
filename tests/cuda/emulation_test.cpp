// The emulated device itself: what it computes, and that it sees the mistakes it is there to see.
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/matrix.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/scan.h"

namespace moba::cuda {
namespace {

/// What a kernel's mistake is answered with.
std::string error_of(int threads, const std::function<void()>& kernel) {
  try {
    emulation::run("wrong", {}, threads, 4096, kernel);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

TEST(Emulation, EveryThreadOfEveryBlockRunsOnce) {
  std::vector<int> seen(3 * 2 * 64);
  emulation::run("count", {3, 2}, 64, 0, [&] {
    ++seen[(ptx::block_y() * 3 + ptx::block_x()) * 64 + static_cast<unsigned>(ptx::thread())];
  });
  for (const int times : seen) EXPECT_EQ(times, 1);
}

TEST(Emulation, ScanAddsUpInOrder) {
  std::vector<int> before(256), total(256);
  emulation::run("scan", {}, 256, 8 * sizeof(int), [&] {
    const auto scanned = tile::scan<256>(ptx::thread() + 1, reinterpret_cast<int*>(ptx::shared()));
    before[static_cast<std::size_t>(ptx::thread())] = scanned.before;
    total[static_cast<std::size_t>(ptx::thread())] = scanned.total;
  });
  for (int i = 0; i < 256; ++i) {
    EXPECT_EQ(before[static_cast<std::size_t>(i)], i * (i + 1) / 2);
    EXPECT_EQ(total[static_cast<std::size_t>(i)], 256 * 257 / 2);
  }
}

TEST(Emulation, WarpsExchangeValues) {
  emulation::run("exchange", {}, 64, 0, [] {
    const int lane = ptx::lane();
    EXPECT_EQ(ptx::shuffle(lane, 5), 5);
    EXPECT_EQ(ptx::shuffle_xor(lane, 8), lane ^ 8);
    EXPECT_EQ(ptx::shuffle_up(lane, 2), lane < 2 ? lane : lane - 2);
    EXPECT_EQ(ptx::ballot(lane % 2 == 0), 0x55555555U);
    EXPECT_EQ(ptx::match(static_cast<std::uint32_t>(lane / 16)), lane < 16 ? 0xFFFFU : 0xFFFF0000U);
  });
}

/// [16 x 16] times [16 x 8] out of shared memory, the right side either way round.
template <typename T>
void check_product(bool transposed) {
  float product[16][8];
  emulation::run("product", {}, 32, 2 * 16 * 16 * 2, [&] {
    auto* left = reinterpret_cast<T*>(ptx::shared());
    T* right = left + 256;  // [n][k], or [k][n] when transposed
    const int lane = ptx::lane();
    for (int i = lane; i < 256; i += 32) {
      left[i].bits = ptx::rounded_bits(T{}, static_cast<float>(i / 16 - i % 16));
      right[i].bits = ptx::rounded_bits(T{}, static_cast<float>(i / 16 * 2 + i % 16));
    }
    ptx::warp_barrier();
    const auto bytes = [](int elements) { return static_cast<std::uint32_t>(2 * elements); };
    std::uint32_t a[4], b[4];
    ptx::load_tiles(a, left, bytes(lane % 16 * 16 + lane / 16 * 8));
    float d[4] = {1, 1, 1, 1};
    if (transposed) {
      ptx::load_tiles_transposed(b, right, bytes((lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8));
    } else {
      ptx::load_tiles(b, right, bytes((lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8));
    }
    ptx::multiply<T>(d, a, b[0], b[1]);
    for (int r = 0; r < 4; ++r) product[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = d[r];
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 1;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<float>((row - k) * (transposed ? k * 2 + column : column * 2 + k));
      EXPECT_EQ(product[row][column], sum) << row << ", " << column;
    }
  }
}

TEST(Emulation, MatrixProductsHaveTheHardwaresLayout) {
  check_product<bfloat16>(false);
  check_product<bfloat16>(true);
  check_product<float16>(false);
  check_product<float16>(true);
}

TEST(Emulation, PairsRoundToNearest) {
  EXPECT_EQ(ptx::pack<bfloat16>(1, -2), 0xC0003F80U);
  EXPECT_EQ(ptx::pack<float16>(1, -2), 0xC0003C00U);
  EXPECT_EQ(ptx::unpack_low<float16>(0xC0003C00U), 1);
  EXPECT_EQ(ptx::unpack_high<bfloat16>(0xC0003F80U), -2);
}

TEST(Emulation, CopiesLandWhenTheyAreWaitedFor) {
  std::vector<std::uint32_t> from(64 * 4, 7);
  emulation::run("copy", {}, 64, 64 * 16, [&] {
    const std::byte* to = ptx::shared() + ptx::thread() * 16;
    ptx::copy_async(ptx::shared(), static_cast<std::uint32_t>(ptx::thread()) * 16,
                    from.data() + ptx::thread() * 4, ptx::thread() != 3);
    ptx::copy_commit();
    ptx::copy_wait<0>();
    EXPECT_EQ(*reinterpret_cast<const std::uint32_t*>(to), ptx::thread() == 3 ? 0U : 7U);
  });
}

TEST(Emulation, AMissingWaitShows) {
  const std::vector<std::uint32_t> from(64 * 4, 7);
  int poisoned = 0;
  emulation::run("copy", {}, 64, 64 * 16, [&] {
    const std::byte* to = ptx::shared() + ptx::thread() * 16;
    ptx::copy_async(ptx::shared(), static_cast<std::uint32_t>(ptx::thread()) * 16,
                    from.data() + ptx::thread() * 4, true);
    ptx::copy_commit();
    poisoned += std::isnan(*reinterpret_cast<const float*>(to)) ? 1 : 0;
    ptx::copy_wait<0>();
  });
  EXPECT_GT(poisoned, 0);
}

TEST(Emulation, DivergenceIsAnError) {
  const std::string error = error_of(32, [] {
    if (ptx::lane() == 7) {
      ptx::warp_barrier();
    } else {
      ptx::shuffle(1, 0);
    }
  });
  EXPECT_NE(
      error.find(
          "kernel wrong, block (0, 0, 0): warp 0: lane 0 waits at shuffle, lane 7 waits at warp barrier"),
      std::string::npos)
      << error;
}

TEST(Emulation, ABarrierThatNotAllReachIsAnError) {
  const std::string error = error_of(64, [] {
    if (ptx::warp() == 0) ptx::barrier();
  });
  EXPECT_NE(error.find("no thread can go on; warp 0 waits at barrier 0; warp 1 has ended"), std::string::npos)
      << error;
}

TEST(Emulation, AnEarlyReturnBeforeACollectiveIsAnError) {
  const std::string error = error_of(32, [] {
    if (ptx::lane() != 9) ptx::ballot(true);
  });
  EXPECT_NE(error.find("but lane 9 has ended"), std::string::npos) << error;
}

TEST(Emulation, ABarrierForTwoCountsIsAnError) {
  const std::string error = error_of(64, [] { ptx::named_barrier(1, ptx::warp() == 0 ? 64 : 96); });
  EXPECT_NE(error.find("barrier 1 is for"), std::string::npos) << error;
}

TEST(Emulation, CopiesThatNobodyWaitsForAreAnError) {
  const std::vector<std::uint32_t> from(4, 7);
  const std::string error = error_of(32, [&] {
    if (ptx::thread() == 0) ptx::copy_async(ptx::shared(), 0, from.data(), true);
  });
  EXPECT_NE(error.find("copies that nobody waited for"), std::string::npos) << error;
}

TEST(Emulation, NamedBarriersHoldBackSomeWarpsAlone) {
  int order = 0, first = 0, second = 0;
  emulation::run("pair", {}, 64, 0, [&] {
    if (ptx::warp() == 0) {
      if (ptx::lane() == 0) first = ++order;
      ptx::warp_barrier();
      ptx::named_barrier_arrive(2, 64);
    } else {
      ptx::named_barrier(2, 64);
      if (ptx::lane() == 0) second = ++order;
    }
  });
  EXPECT_EQ(first, 1);
  EXPECT_EQ(second, 2);
}

}  // namespace
}  // namespace moba::cuda
