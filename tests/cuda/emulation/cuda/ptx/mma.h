#pragma once

#include <cstring>

#include "cuda/ptx/convert.h"
#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/mma.h: the tensor cores' instructions, over the operands of all lanes.
namespace moba::cuda::ptx {

MOBA_DEVICE void ldmatrix_x4(std::uint32_t (&to)[4], const void* shared, std::uint32_t row) {
  struct Operands {
    std::uint32_t* to;
    const std::byte* row;
  } own{to, static_cast<const std::byte*>(shared) + row};
  emulation::collective("ldmatrix_x4", &own, [](void* const* lanes) {
    for (int i = 0; i < kLanes; ++i) {
      for (int tile = 0; tile < 4; ++tile) {
        const std::byte* from = static_cast<Operands*>(lanes[8 * tile + i / 4])->row;
        std::memcpy(static_cast<Operands*>(lanes[i])->to + tile, from + i % 4 * 4, 4);
      }
    }
  });
}

MOBA_DEVICE void ldmatrix_x4_trans(std::uint32_t (&to)[4], const void* shared, std::uint32_t row) {
  struct Operands {
    std::uint32_t* to;
    const std::byte* row;
  } own{to, static_cast<const std::byte*>(shared) + row};
  emulation::collective("ldmatrix_x4_trans", &own, [](void* const* lanes) {
    for (int i = 0; i < kLanes; ++i) {
      for (int tile = 0; tile < 4; ++tile) {
        std::uint16_t pair[2];
        for (int e = 0; e < 2; ++e)
          std::memcpy(pair + e, static_cast<Operands*>(lanes[8 * tile + i % 4 * 2 + e])->row + i / 4 * 2, 2);
        std::memcpy(static_cast<Operands*>(lanes[i])->to + tile, pair, 4);
      }
    }
  });
}

/// Computes sum += left right. Not instrumented: most of a test's time is spent here, and all indices are
/// constants.
__attribute__((no_sanitize("address", "undefined"))) inline void multiply_m16k16(const float (&left)[16][16],
                                                                                 const float (&right)[16][8],
                                                                                 float (&sum)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    }
  }
}

template <typename T>
MOBA_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                              std::uint32_t b1) {
  struct Operands {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
  } own{d, a, {b0, b1}};
  emulation::collective("mma_m16n8k16", &own, [](void* const* lanes) {
    float left[16][16], right[16][8], sum[16][8];
    for (int i = 0; i < kLanes; ++i) {
      const auto* lane = static_cast<Operands*>(lanes[i]);
      const int g = i / 4, c = 2 * (i % 4);
      for (int r = 0; r < 4; ++r) {
        left[g + r % 2 * 8][c + r / 2 * 8] = unpack_low<T>(lane->a[r]);
        left[g + r % 2 * 8][c + r / 2 * 8 + 1] = unpack_high<T>(lane->a[r]);
      }
      for (int r = 0; r < 2; ++r) {
        right[c + 8 * r][g] = unpack_low<T>(lane->b[r]);
        right[c + 8 * r + 1][g] = unpack_high<T>(lane->b[r]);
      }
      for (int r = 0; r < 4; ++r) sum[g + r / 2 * 8][c + r % 2] = lane->d[r];
    }
    multiply_m16k16(left, right, sum);
    for (int i = 0; i < kLanes; ++i) {
      for (int r = 0; r < 4; ++r)
        static_cast<Operands*>(lanes[i])->d[r] = sum[i / 4 + r / 2 * 8][2 * (i % 4) + r % 2];
    }
  });
}

}  // namespace moba::cuda::ptx
