#pragma once

#include "cuda/ptx/descriptor.h"

/// wgmma of sm_90a: the four warps of a warpgroup asynchronously multiply A[64 x 16] and B[16 x N] from
/// shared memory. Warp w holds rows 16 w to 16 w + 15 of A and of the accumulator D[64 x N] in the layouts
/// of ptx::mma_m16n8k16; d[j] holds columns 8 j to 8 j + 7.
///
/// Operands in shared memory are rows of 128 bytes; eight rows are a core of 1024 aligned bytes, in which
/// the 16-byte vectors of row r are swizzled by XOR with r (PTX ISA, "128-Byte swizzle mode").
namespace moba::cuda::ptx {

/// True in a compilation for sm_90a; kernels that need wgmma are empty elsewhere.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif
constexpr int kWarpgroupThreads = 128;

MOBA_DEVICE std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

/// Orders register accesses before wgmma: called before the first product and after other writes to its
/// registers.
MOBA_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

#define MOBA_SUMS_OF(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define MOBA_SUMS_64                                                                                    \
  MOBA_SUMS_OF(0), MOBA_SUMS_OF(1), MOBA_SUMS_OF(2), MOBA_SUMS_OF(3), MOBA_SUMS_OF(4), MOBA_SUMS_OF(5), \
      MOBA_SUMS_OF(6), MOBA_SUMS_OF(7)
#define MOBA_SUMS_128                                                                                   \
  MOBA_SUMS_64, MOBA_SUMS_OF(8), MOBA_SUMS_OF(9), MOBA_SUMS_OF(10), MOBA_SUMS_OF(11), MOBA_SUMS_OF(12), \
      MOBA_SUMS_OF(13), MOBA_SUMS_OF(14), MOBA_SUMS_OF(15)
#define MOBA_NAMES_64                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOBA_NAMES_128                                                                                     \
  MOBA_NAMES_64                                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/// The instruction for the number of tiles and the type, of the MOBA_MULTIPLY_64 and _128 defined at its
/// place.
#define MOBA_MULTIPLY_TILES                           \
  if constexpr (tiles == 8) {                         \
    if constexpr (std::is_same_v<T, bfloat16>) {      \
      MOBA_MULTIPLY_64("bf16");                       \
    } else {                                          \
      MOBA_MULTIPLY_64("f16");                        \
    }                                                 \
  } else if constexpr (std::is_same_v<T, bfloat16>) { \
    MOBA_MULTIPLY_128("bf16");                        \
  } else {                                            \
    MOBA_MULTIPLY_128("f16");                         \
  }

/// Issues d = A B^T or d += A B^T, both operands K-major in shared memory.
template <typename T, int tiles>
MOBA_DEVICE void wgmma_ss(float (&d)[tiles][4], std::uint64_t a, std::uint64_t b, bool add) {
  static_assert(tiles == 8 || tiles == 16);
#define MOBA_MULTIPLY_64(type)                                                       \
  asm volatile(                                                                      \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MOBA_NAMES_64 \
      "}, %32, %33, add, 1, 1, 0, 0;\n}"                                             \
      : MOBA_SUMS_64                                                                 \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define MOBA_MULTIPLY_128(type)                                                        \
  asm volatile(                                                                        \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" MOBA_NAMES_128 \
      "}, %64, %65, add, 1, 1, 0, 0;\n}"                                               \
      : MOBA_SUMS_128                                                                  \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  MOBA_MULTIPLY_TILES
#undef MOBA_MULTIPLY_64
#undef MOBA_MULTIPLY_128
}

/// Issues d += A B with A in registers and B MN-major in shared memory.
template <typename T, int tiles>
MOBA_DEVICE void wgmma_rs(float (&d)[tiles][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  static_assert(tiles == 8 || tiles == 16);
#define MOBA_MULTIPLY_64(type)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MOBA_NAMES_64 \
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                    \
               : MOBA_SUMS_64                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MOBA_MULTIPLY_128(type)                                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" MOBA_NAMES_128 \
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                      \
               : MOBA_SUMS_128                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  MOBA_MULTIPLY_TILES
#undef MOBA_MULTIPLY_64
#undef MOBA_MULTIPLY_128
}
MOBA_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most the newest `pending` groups are in flight. `d` are accumulators of completed groups:
/// operands, so that no read of them moves before the wait.
template <int pending = 0, int tiles>
MOBA_DEVICE void wgmma_wait(float (&d)[tiles][4]) {
  static_assert(tiles == 8 || tiles == 16);
  if constexpr (tiles == 8) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : MOBA_SUMS_64 : "n"(pending) : "memory");
  } else {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : MOBA_SUMS_128 : "n"(pending) : "memory");
  }
}
/// Has the compiler compute `value`, which is never below 0, before what follows, such as a wait for products
/// that its computation overlaps: ptxas moves waits up within a basic block.
MOBA_DEVICE void pin(float value) {
  asm volatile("{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never trap;\n}" ::"f"(value)
               : "memory");
}
#undef MOBA_MULTIPLY_TILES
#undef MOBA_SUMS_OF
#undef MOBA_SUMS_64
#undef MOBA_SUMS_128
#undef MOBA_NAMES_64
#undef MOBA_NAMES_128

/// Sets the number of registers of each thread of this warpgroup (setmaxnreg).
template <int registers>
MOBA_DEVICE void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
MOBA_DEVICE void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace moba::cuda::ptx
