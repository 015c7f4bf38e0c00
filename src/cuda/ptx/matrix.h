#pragma once

#include "cuda/ptx/device.h"

#if defined(MOBA_CUDA_EMULATION)
#include <cstring>

#include "cuda/ptx/convert.h"
#endif

/// The tensor cores' instructions of sm_80: 8 x 8 tiles of 16-bit elements from shared memory into registers,
/// and D[16 x 8] += A[16 x 16] B[16 x 8]. Who holds what, with g = lane / 4 and c = lane % 4 (PTX ISA,
/// "Matrix Fragments for mma.m16n8k16"):
///   a[0] = A[g][2c, 2c + 1]   a[1] = A[g + 8][..]   a[2] = A[g][2c + 8, 2c + 9]   a[3] = A[g + 8][2c + 8 ..]
///   b[0] = B[2c, 2c + 1][g]   b[1] = B[2c + 8, 2c + 9][g]
///   d[0], d[1] = D[g][2c, 2c + 1]   d[2], d[3] = D[g + 8][2c, 2c + 1]
namespace moba::cuda::ptx {

#if defined(MOBA_CUDA_EMULATION)

/// Four 8 x 8 tiles: lanes 8 i to 8 i + 7 give the rows of tile i, in bytes from `shared`, and result i of a
/// lane is elements [g][2c, 2c + 1] of it. (32-bit offsets: whole addresses would take twice the registers.)
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

/// The same with every tile transposed: result i of a lane is elements [2c, 2c + 1][g] of tile i.
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

/// sum += left right. Most of a test's time is spent here, and its indices are constants: not instrumented.
__attribute__((no_sanitize("address", "undefined"))) inline void multiply_tiles(const float (&left)[16][16],
                                                                                const float (&right)[16][8],
                                                                                float (&sum)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    }
  }
}

/// d += a b.
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
    multiply_tiles(left, right, sum);
    for (int i = 0; i < kLanes; ++i) {
      for (int r = 0; r < 4; ++r)
        static_cast<Operands*>(lanes[i])->d[r] = sum[i / 4 + r / 2 * 8][2 * (i % 4) + r % 2];
    }
  });
}

#else

/// Four 8 x 8 tiles: lanes 8 i to 8 i + 7 give the rows of tile i, in bytes from `shared`, and result i of a
/// lane is elements [g][2c, 2c + 1] of it. (32-bit offsets: whole addresses would take twice the registers.)
MOBA_DEVICE void ldmatrix_x4(std::uint32_t (&to)[4], const void* shared, std::uint32_t row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) + row;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// The same with every tile transposed: result i of a lane is elements [2c, 2c + 1][g] of tile i.
MOBA_DEVICE void ldmatrix_x4_trans(std::uint32_t (&to)[4], const void* shared, std::uint32_t row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) + row;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// d += a b.
template <typename T>
MOBA_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                              std::uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#endif

}  // namespace moba::cuda::ptx
