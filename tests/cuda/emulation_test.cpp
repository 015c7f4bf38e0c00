// The emulated device: its results, and the mistakes that it detects.
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/warp.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/swizzled_tile_128b.h"
#include "emulation/memory.h"

namespace moba::cuda {
namespace {

/// Returns the message of the error that a kernel throws.
std::string error_of(int threads, const std::function<void()>& kernel) {
  try {
    emulation::run("wrong", {}, threads, 4096, kernel);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

/// Words of 7 in device memory.
class DeviceWords {
 public:
  explicit DeviceWords(std::size_t count) : words_(count, 7), range_(words_.data(), 4 * count) {}
  const std::uint32_t* data() const { return words_.data(); }

 private:
  std::vector<std::uint32_t> words_;
  emulation::DeviceRange range_;
};

TEST(Emulation, EveryThreadOfEveryBlockRunsOnce) {
  std::vector<int> seen(3 * 2 * 64);
  emulation::run("count", {3, 2}, 64, 0, [&] {
    ++seen[(ptx::block_y() * 3 + ptx::block_x()) * 64 + static_cast<unsigned>(ptx::thread())];
  });
  for (const int times : seen) EXPECT_EQ(times, 1);
}

TEST(Emulation, ScanSumsInOrder) {
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
    EXPECT_EQ(ptx::shfl(lane, 5), 5);
    EXPECT_EQ(ptx::shfl_xor(lane, 8), lane ^ 8);
    EXPECT_EQ(ptx::shfl_up(lane, 2), lane < 2 ? lane : lane - 2);
    EXPECT_EQ(ptx::ballot(lane % 2 == 0), 0x55555555U);
    EXPECT_EQ(ptx::match_any(static_cast<std::uint32_t>(lane / 16)), lane < 16 ? 0xFFFFU : 0xFFFF0000U);
  });
}

/// Checks a product of [16 x 16] and [16 x 8] in shared memory, with B in either layout.
template <typename T>
void check_product(bool transposed) {
  float product[16][8];
  emulation::run("product", {}, 32, 2 * 16 * 16 * 2, [&] {
    auto* left = reinterpret_cast<T*>(ptx::shared());
    T* right = left + 256;  // [n][k], or [k][n] when transposed
    const int lane = ptx::lane();
    for (int i = lane; i < 256; i += 32) {
      const int row = i / 16, column = i % 16;
      left[i].bits = ptx::rounded_bits(T{}, static_cast<float>(row - column));
      right[i].bits = ptx::rounded_bits(T{}, static_cast<float>(row * 2 + column));
    }
    ptx::syncwarp();
    const auto bytes = [](int elements) { return static_cast<std::uint32_t>(2 * elements); };
    std::uint32_t a[4], b[4];
    ptx::ldmatrix_x4(a, left, bytes(lane % 16 * 16 + lane / 16 * 8));
    float d[4] = {1, 1, 1, 1};
    if (transposed) {
      ptx::ldmatrix_x4_trans(b, right, bytes((lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8));
    } else {
      ptx::ldmatrix_x4(b, right, bytes((lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8));
    }
    ptx::mma_m16n8k16<T>(d, a, b[0], b[1]);
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

TEST(Emulation, MmaMatchesTheFragmentLayout) {
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

TEST(Emulation, CpAsyncHasCompletedAfterItsWait) {
  const DeviceWords from(64 * 4);
  emulation::run("copy", {}, 64, 64 * 16, [&] {
    const std::byte* to = ptx::shared() + ptx::thread() * 16;
    ptx::cp_async_16(ptx::shared(), static_cast<std::uint32_t>(ptx::thread()) * 16,
                     from.data() + ptx::thread() * 4, ptx::thread() != 3);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    EXPECT_EQ(*reinterpret_cast<const std::uint32_t*>(to), ptx::thread() == 3 ? 0U : 7U);
  });
}

TEST(Emulation, MissingWaitIsDetected) {
  const DeviceWords from(64 * 4);
  int poisoned = 0;
  emulation::run("copy", {}, 64, 64 * 16, [&] {
    const std::byte* to = ptx::shared() + ptx::thread() * 16;
    ptx::cp_async_16(ptx::shared(), static_cast<std::uint32_t>(ptx::thread()) * 16,
                     from.data() + ptx::thread() * 4, true);
    ptx::cp_async_commit();
    poisoned += std::isnan(*reinterpret_cast<const float*>(to)) ? 1 : 0;
    ptx::cp_async_wait<0>();
  });
  EXPECT_GT(poisoned, 0);
}

TEST(Emulation, CopyFromHostMemoryThrows) {
  const std::vector<std::uint32_t> from(4, 7);
  const std::string error = error_of(32, [&] {
    ptx::cp_async_16(ptx::shared(), 0, from.data(), false);
    if (ptx::thread() == 0) ptx::cp_async_16(ptx::shared(), 0, from.data(), true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  });
  EXPECT_NE(error.find("a copy reads memory of the host"), std::string::npos) << error;
}

TEST(Emulation, DeviceMemoryIsWhatItAllocated) {
  auto* const memory = static_cast<std::byte*>(emulation::allocate(100));
  EXPECT_TRUE(emulation::is_device_memory(memory));
  EXPECT_TRUE(emulation::is_device_memory(memory + 99));
  EXPECT_FALSE(emulation::is_device_memory(memory + 100));
  EXPECT_FALSE(emulation::is_device_memory(memory - 1));
  EXPECT_FALSE(emulation::is_device_memory(nullptr));
  emulation::release(memory);
  EXPECT_FALSE(emulation::is_device_memory(memory));
}

TEST(Emulation, DivergentWarpThrows) {
  const std::string error = error_of(32, [] {
    if (ptx::lane() == 7) {
      ptx::syncwarp();
    } else {
      ptx::shfl(1, 0);
    }
  });
  EXPECT_NE(
      error.find(
          "kernel wrong, block (0, 0, 0): warp 0: lane 0 waits at shuffle, lane 7 waits at warp barrier"),
      std::string::npos)
      << error;
}

TEST(Emulation, BarrierThatAWarpSkipsThrows) {
  const std::string error = error_of(64, [] {
    if (ptx::warp() == 0) ptx::syncthreads();
  });
  EXPECT_NE(error.find("no thread can go on; warp 0 waits at barrier 0; warp 1 has ended"), std::string::npos)
      << error;
}

TEST(Emulation, EarlyReturnBeforeACollectiveThrows) {
  const std::string error = error_of(32, [] {
    if (ptx::lane() != 9) ptx::ballot(true);
  });
  EXPECT_NE(error.find("but lane 9 has ended"), std::string::npos) << error;
}

TEST(Emulation, BarrierWithTwoThreadCountsThrows) {
  const std::string error = error_of(64, [] { ptx::bar_sync(1, ptx::warp() == 0 ? 64 : 96); });
  EXPECT_NE(error.find("barrier 1 is for"), std::string::npos) << error;
}

TEST(Emulation, UnwaitedCopyThrows) {
  const DeviceWords from(4);
  const std::string error = error_of(32, [&] {
    if (ptx::thread() == 0) ptx::cp_async_16(ptx::shared(), 0, from.data(), true);
  });
  EXPECT_NE(error.find("copies that were never waited for"), std::string::npos) << error;
}

TEST(Emulation, NamedBarriersOrderSyncAfterArrive) {
  int order = 0, first = 0, second = 0;
  emulation::run("pair", {}, 64, 0, [&] {
    if (ptx::warp() == 0) {
      if (ptx::lane() == 0) first = ++order;
      ptx::syncwarp();
      ptx::bar_arrive(2, 64);
    } else {
      ptx::bar_sync(2, 64);
      if (ptx::lane() == 0) second = ++order;
    }
  });
  EXPECT_EQ(first, 1);
  EXPECT_EQ(second, 2);
}

/// Returns small integers, whose products and sums are exact.
float number_at(int row, int column) {
  return static_cast<float>((row * 5 + column * 3) % 7 - 3);
}

/// Fills a tile with such numbers; all threads of a warpgroup call it.
template <typename T, int rows, int head_dim>
void write_numbers(const tile::SwizzledTile128B<T, rows, head_dim>& to) {
  for (int i = ptx::thread(); i < rows * head_dim; i += ptx::kWarpgroupThreads) {
    const int row = i / head_dim, column = i % head_dim;
    to.vec(row, column / 8)[column % 8].bits = ptx::rounded_bits(T{}, number_at(row, column));
    emulation::wrote(to.vec(row, column / 8));
  }
}

/// Checks the products of rows [64, 128) of a tile with all its rows and with themselves (both operands in
/// shared memory), and of small values with its columns (A in registers).
template <typename T, int head_dim>
void check_group_products() {
  using Tile = tile::SwizzledTile128B<T, 128, head_dim>;
  std::vector<float> logits(64 * 128), half(64 * 64), sums(64 * head_dim);
  emulation::run("group", {}, ptx::kWarpgroupThreads, Tile::kBytes, [&] {
    const Tile tile{ptx::shared()};
    write_numbers(tile);
    ptx::fence_proxy_async();
    ptx::syncthreads();
    float d[16][4], d_half[8][4], out[head_dim / 8][4] = {};
    ptx::wgmma_fence();
    for (int k = 0; k < head_dim / 16; ++k)
      ptx::wgmma_ss<T>(d, tile.k_major_descriptor(64, k), tile.k_major_descriptor(0, k), k > 0);
    ptx::wgmma_commit();
    for (int k = 0; k < head_dim / 16; ++k)
      ptx::wgmma_ss<T>(d_half, tile.k_major_descriptor(64, k), tile.k_major_descriptor(64, k), k > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(d);
    // A is made of columns 0 to 15 of the product, reduced to small values; B is rows 16 to 31 of the tile.
    std::uint32_t a[4];
    const auto small = [](float value) { return static_cast<float>(static_cast<int>(value) % 4); };
    for (int r = 0; r < 4; ++r)
      a[r] = ptx::pack<T>(small(d[r / 2][r % 2 * 2]), small(d[r / 2][r % 2 * 2 + 1]));
    ptx::wgmma_fence();
    ptx::wgmma_rs<T>(out, a, tile.mn_major_descriptor(16));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(d_half);
    ptx::wgmma_wait(out);
    const int row = ptx::warp() * 16 + ptx::lane() / 4, column = ptx::lane() % 4 * 2;
    const auto put = [&](std::vector<float>& to, int columns, int j, int e, float value) {
      to[static_cast<std::size_t>((row + e / 2 * 8) * columns + 8 * j + column + e % 2)] = value;
    };
    for (int e = 0; e < 4; ++e) {
      for (int j = 0; j < 16; ++j) put(logits, 128, j, e, d[j][e]);
      for (int j = 0; j < 8; ++j) put(half, 64, j, e, d_half[j][e]);
      for (int j = 0; j < head_dim / 8; ++j) put(sums, head_dim, j, e, out[j][e]);
    }
  });
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 128; ++column) {
      float sum = 0;
      for (int k = 0; k < head_dim; ++k) sum += number_at(64 + row, k) * number_at(column, k);
      ASSERT_EQ(logits[static_cast<std::size_t>(row * 128 + column)], sum) << row << ", " << column;
      if (column >= 64) {
        ASSERT_EQ(half[static_cast<std::size_t>(row * 64 + column - 64)], sum) << row << ", " << column;
      }
    }
    for (int column = 0; column < head_dim; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        const int weight = static_cast<int>(logits[static_cast<std::size_t>(row * 128 + k)]) % 4;
        sum += static_cast<float>(weight) * number_at(16 + k, column);
      }
      ASSERT_EQ(sums[static_cast<std::size_t>(row * head_dim + column)], sum) << row << ", " << column;
    }
  }
}

TEST(Emulation, WgmmaMatchesTheFragmentLayout) {
  check_group_products<bfloat16, 64>();
  check_group_products<float16, 128>();
}

/// Compares the 128-byte swizzle and the descriptor with literals derived from the PTX manual.
TEST(Emulation, MatrixDescriptorMatchesThePtxManual) {
  EXPECT_EQ(ptx::matrix_descriptor(0x12340, 0x4000, 1024), 0x4000004004001234U);
  using Tile = tile::SwizzledTile128B<bfloat16, 128, 128>;
  EXPECT_EQ(Tile::start(0, 3), 3U * 16);
  EXPECT_EQ(Tile::start(9, 3), 9U * 128 + 2 * 16);
  EXPECT_EQ(Tile::start(9, 11), 128U * 128 + 9 * 128 + 2 * 16);
}

/// A TMA box of a tensor with two heads, partly past its end, arrives where SwizzledTile128B reads it.
TEST(Emulation, TmaZeroFillsOutOfBounds) {
  constexpr int kTokens = 20, kHeads = 2, kRows = 16;
  std::vector<std::uint16_t> values(kTokens * kHeads * 64);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::uint16_t>(i + 1);
  const TensorMap map{.data = reinterpret_cast<const std::byte*>(values.data()),
                      .sizes = {kTokens, kHeads, 64},
                      .strides = {kHeads * 128, 128},
                      .rows = kRows};
  using Tile = tile::SwizzledTile128B<bfloat16, kRows, 64>;
  emulation::run("box", {}, 32, Tile::kBytes + sizeof(ptx::Mbarrier), [&] {
    const Tile tile{ptx::shared()};
    auto* barrier = reinterpret_cast<ptx::Mbarrier*>(tile.data + Tile::kBytes);
    if (ptx::lane() == 0) {
      ptx::mbarrier_init(barrier, 1);
      ptx::fence_proxy_async();
    }
    ptx::syncthreads();
    if (ptx::lane() == 5) {
      ptx::mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
      ptx::tma_load_3d(tile.data, map, 0, 1, 10, barrier);
    }
    ptx::mbarrier_wait(barrier, 1);
    ptx::mbarrier_wait(barrier, 0);
    for (int i = ptx::lane(); i < kRows * 64; i += 32) {
      const int row = i / 64, column = i % 64, expected = ((10 + row) * kHeads + 1) * 64 + column + 1;
      EXPECT_EQ(tile.vec(row, column / 8)[column % 8].bits, row < 10 ? expected : 0) << row;
    }
  });
}

TEST(Emulation, UnwaitedWgmmaThrows) {
  std::string found;
  for (int i = 0; i < 20 && found.empty(); ++i) {  // a wgmma may run when it is issued
    found = error_of(ptx::kWarpgroupThreads, [] {
      float d[8][4] = {};
      const std::uint32_t a[4] = {};
      ptx::wgmma_rs<bfloat16>(d, a, ptx::matrix_descriptor(1024, 16, 1024));
    });
  }
  EXPECT_NE(found.find("products that were never waited for"), std::string::npos) << found;
}

TEST(Emulation, UnfencedOperandThrows) {
  const DeviceWords from(4);
  for (const bool fences : {false, true}) {
    const std::string error = error_of(ptx::kWarpgroupThreads, [&] {
      ptx::cp_async_16(ptx::shared(), 0, from.data(), true);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      if (fences) ptx::fence_proxy_async();
      ptx::syncthreads();
      float d[8][4] = {};
      const std::uint32_t a[4] = {};
      ptx::wgmma_rs<bfloat16>(d, a, ptx::matrix_descriptor(1024, 16, 1024));
      ptx::wgmma_commit();
      ptx::wgmma_wait(d);
    });
    EXPECT_EQ(error.find("without a fence") == std::string::npos, fences) << error;
  }
}

TEST(Emulation, MbarrierPhaseWithoutArrivalOrBytesThrows) {
  for (const std::uint32_t bytes : {0U, 16U}) {
    const std::string error = error_of(32, [&] {
      auto* barrier = reinterpret_cast<ptx::Mbarrier*>(ptx::shared());
      if (ptx::lane() == 0) ptx::mbarrier_init(barrier, bytes == 0 ? 2 : 1);
      ptx::syncthreads();
      if (ptx::lane() == 0) ptx::mbarrier_arrive_expect_tx(barrier, bytes);
      ptx::mbarrier_wait(barrier, 0);
    });
    EXPECT_NE(error.find("warp 0 waits for a phase of an mbarrier"), std::string::npos) << error;
  }
}

TEST(Emulation, UninitialisedMbarrierThrows) {
  const std::string error =
      error_of(32, [] { ptx::mbarrier_arrive(reinterpret_cast<ptx::Mbarrier*>(ptx::shared())); });
  EXPECT_NE(error.find("used before it is initialised"), std::string::npos) << error;
}

TEST(Emulation, DivergentWarpgroupThrows) {
  const std::string error = error_of(ptx::kWarpgroupThreads, [] {
    if (ptx::warp() != 2) ptx::wgmma_fence();
  });
  EXPECT_NE(error.find("warp 0 waits at wgmma.fence; warp 1 waits at wgmma.fence; warp 2 has ended"),
            std::string::npos)
      << error;
}

}  // namespace
}  // namespace moba::cuda
