#pragma once

#include "cuda/ptx/device.h"

/// ldmatrix and mma.sync of sm_80. Fragment layout of D[16 x 8] += A[16 x 16] B[16 x 8], with g = lane / 4
/// and c = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
///   a[0] = A[g][2c, 2c + 1]   a[1] = A[g + 8][..]   a[2] = A[g][2c + 8, 2c + 9]   a[3] = A[g + 8][2c + 8 ..]
///   b[0] = B[2c, 2c + 1][g]   b[1] = B[2c + 8, 2c + 9][g]
///   d[0], d[1] = D[g][2c, 2c + 1]   d[2], d[3] = D[g + 8][2c, 2c + 1]
namespace moba::cuda::ptx {

/// Loads four 8 x 8 tiles: lanes 8 i to 8 i + 7 give the byte offsets of the rows of tile i from `shared`,
/// and result i of a lane is elements [g][2c, 2c + 1]. (Offsets take 32 bits; addresses would take twice the
/// registers.)
MOBA_DEVICE void ldmatrix_x4(std::uint32_t (&to)[4], const void* shared, std::uint32_t row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) + row;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// Loads four 8 x 8 tiles transposed: result i of a lane is elements [2c, 2c + 1][g] of tile i.
MOBA_DEVICE void ldmatrix_x4_trans(std::uint32_t (&to)[4], const void* shared, std::uint32_t row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) + row;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// Computes d += a b.
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

}  // namespace moba::cuda::ptx
