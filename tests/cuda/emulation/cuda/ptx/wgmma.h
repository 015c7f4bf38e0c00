#pragma once

#include <cstring>

#include "cuda/ptx/convert.h"
#include "cuda/ptx/descriptor.h"

/// Replaces src/cuda/ptx/wgmma.h: asynchronous products run when they are issued or when they are waited
/// for.
namespace moba::cuda::ptx {

inline constexpr bool kHasWarpgroups = true;
constexpr int kWarpgroupThreads = 128;

constexpr std::uint32_t kSharedBegin = 1024;  // reserved by the system

MOBA_DEVICE std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(shared) - emulation::here().shared) +
         kSharedBegin;
}

/// Returns an element of an operand: row or column `index` and step `k`.
template <typename T>
float operand_at(std::uint64_t descriptor, bool along_k, int index, int k) {
  const auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3FFFU) << 4; };
  const std::uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto i = static_cast<std::uint32_t>(index), step = static_cast<std::uint32_t>(k);
  const std::uint32_t linear = along_k ? i / 8 * stride + i % 8 * 128 + step * 2
                                       : i / 64 * leading + i % 64 * 2 + step / 8 * stride + step % 8 * 128;
  const std::uint32_t address = (start + linear) ^ ((start + linear) >> 7 & 7U) << 4;
  const std::byte* at = emulation::here().shared + (address - kSharedBegin);
  if (!emulation::check_fenced(at)) return 0;
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, 2);
  return unpack_low<T>(bits);
}

/// Computes sum += left right; not instrumented, like multiply_m16k16.
template <int columns>
__attribute__((no_sanitize("address", "undefined"))) void multiply_m64k16(const float (&left)[64][16],
                                                                          const float (&right)[16][columns],
                                                                          float (&sum)[64][columns]) {
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < columns; ++column) sum[row][column] += left[row][k] * right[k][column];
    }
  }
}

struct WgmmaOperands {
  float* d;                // [tiles][4]
  const std::uint32_t* a;  // [4], null where A is in shared memory
  std::uint64_t a_shared, b;
  bool add;
};

/// B's rows lie along K where A is in shared memory, and are summed over where it is not.
template <typename T, int tiles>
void run_wgmma(void* const* threads) {
  float left[64][16], right[16][8 * tiles], sum[64][8 * tiles];
  const auto operands = [&](int thread) { return static_cast<const WgmmaOperands*>(threads[thread]); };
  const WgmmaOperands first = *operands(0);
  const auto place = [](int thread, int r) {
    return std::pair{thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8, thread % 4 * 2 + r / 2 * 8};
  };
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    const WgmmaOperands* own = operands(i);
    for (int j = 0; j < tiles; ++j) {
      for (int e = 0; e < 4; ++e) {
        const auto [row, column] = place(i, e / 2);
        sum[row][8 * j + column % 8 + e % 2] = own->add ? own->d[4 * j + e] : 0;
      }
    }
    for (int r = 0; r < 4 && first.a != nullptr; ++r) {
      const auto [row, k] = place(i, r);
      left[row][k] = unpack_low<T>(own->a[r]);
      left[row][k + 1] = unpack_high<T>(own->a[r]);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 64 && first.a == nullptr; ++row)
      left[row][k] = operand_at<T>(first.a_shared, true, row, k);
    for (int column = 0; column < 8 * tiles; ++column)
      right[k][column] = operand_at<T>(first.b, first.a == nullptr, column, k);
  }
  multiply_m64k16(left, right, sum);
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    for (int j = 0; j < tiles; ++j) {
      for (int e = 0; e < 4; ++e) {
        const auto [row, column] = place(i, e / 2);
        operands(i)->d[4 * j + e] = sum[row][8 * j + column % 8 + e % 2];
      }
    }
  }
}

MOBA_DEVICE void wgmma_fence() {
  emulation::warpgroup_collective("wgmma.fence", nullptr, [](void* const*) {});
}
template <typename T, int tiles>
MOBA_DEVICE void wgmma_ss(float (&d)[tiles][4], std::uint64_t a, std::uint64_t b, bool add) {
  const WgmmaOperands own{&d[0][0], nullptr, a, b, add};
  emulation::wgmma_async(&own, sizeof(own), run_wgmma<T, tiles>);
}
template <typename T, int tiles>
MOBA_DEVICE void wgmma_rs(float (&d)[tiles][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  const WgmmaOperands own{&d[0][0], a, 0, b, true};
  emulation::wgmma_async(&own, sizeof(own), run_wgmma<T, tiles>);
}
MOBA_DEVICE void wgmma_commit() {
  emulation::wgmma_commit();
}
/// Waits until at most `pending` committed groups are running.
template <int pending = 0, int tiles>
MOBA_DEVICE void wgmma_wait(float (&)[tiles][4]) {
  emulation::wgmma_wait(pending);
}
MOBA_DEVICE void pin(float) {}
template <int registers>
MOBA_DEVICE void warpgroup_reg_dealloc() {
  emulation::warpgroup_collective("setmaxnreg.dec", nullptr, [](void* const*) {});
}
template <int registers>
MOBA_DEVICE void warpgroup_reg_alloc() {
  emulation::warpgroup_collective("setmaxnreg.inc", nullptr, [](void* const*) {});
}

}  // namespace moba::cuda::ptx
