#pragma once

#include "cuda/ptx/device.h"

#if defined(MOBA_CUDA_EMULATION)
#include <cstring>

#include "cuda/ptx/convert.h"
#endif

/// Products of sm_90a (wgmma): the four warps of a warpgroup, whose first is a multiple of four, multiply
/// A[64 x 16] and B[16 x N] straight out of shared memory, while they go on. Warp w holds rows 16 w to
/// 16 w + 15 of A and of the sums D[64 x N] in the layouts of ptx::mma_m16n8k16; d[j] is of columns 8 j to 8
/// j
/// + 7.
///
/// In shared memory operands lie as rows of 128 bytes, eight of which are a piece of 1024 bytes and aligned;
/// the 16-byte pieces of row r of the eight are permuted by XOR with r (PTX ISA, "128-Byte swizzle mode").
namespace moba::cuda::ptx {

/// Whether this compilation has them: kernels that need them are empty elsewhere.
#if defined(MOBA_CUDA_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif
constexpr int kGroupThreads = 128;

/// Where an operand lies (PTX ISA, "Matrix Descriptor Format"): rows along K go from piece to piece of eight
/// rows with `stride` bytes between; so do columns of K when rows are summed over, and then every 64 columns
/// lie `leading` bytes behind the 64 before.
MOBA_DEVICE std::uint64_t describe_operand(std::uint32_t address, std::uint32_t leading,
                                           std::uint32_t stride) {
  constexpr std::uint64_t kSwizzle128 = 1;
  return std::uint64_t{(address & 0x3FFFFU) >> 4} | std::uint64_t{leading >> 4} << 16 |
         std::uint64_t{stride >> 4} << 32 | kSwizzle128 << 62;
}

#if defined(MOBA_CUDA_EMULATION)

constexpr std::uint32_t kSharedBegin = 1024;  // what the system keeps of it

MOBA_DEVICE std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(shared) - emulation::here().shared) +
         kSharedBegin;
}

/// An element of an operand: row or column `index` and step `k`.
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

/// sum += left right; not instrumented, as multiply_tiles.
template <int columns>
__attribute__((no_sanitize("address", "undefined"))) void multiply_group(const float (&left)[64][16],
                                                                         const float (&right)[16][columns],
                                                                         float (&sum)[64][columns]) {
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < columns; ++column) sum[row][column] += left[row][k] * right[k][column];
    }
  }
}

struct GroupOperands {
  float* d;                // [tiles][4]
  const std::uint32_t* a;  // [4], null where A is in shared memory
  std::uint64_t a_shared, b;
  bool add;
};

/// B's rows lie along K where A is in shared memory, and are summed over where it is not.
template <typename T, int tiles>
void run_group_product(void* const* threads) {
  float left[64][16], right[16][8 * tiles], sum[64][8 * tiles];
  const auto operands = [&](int thread) { return static_cast<const GroupOperands*>(threads[thread]); };
  const GroupOperands first = *operands(0);
  const auto place = [](int thread, int r) {
    return std::pair{thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8, thread % 4 * 2 + r / 2 * 8};
  };
  for (int i = 0; i < kGroupThreads; ++i) {
    const GroupOperands* own = operands(i);
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
  multiply_group(left, right, sum);
  for (int i = 0; i < kGroupThreads; ++i) {
    for (int j = 0; j < tiles; ++j) {
      for (int e = 0; e < 4; ++e) {
        const auto [row, column] = place(i, e / 2);
        operands(i)->d[4 * j + e] = sum[row][8 * j + column % 8 + e % 2];
      }
    }
  }
}

/// Before the first product, and whenever the warpgroup's registers were written by other means.
MOBA_DEVICE void wgmma_fence() {
  emulation::group_collective("wgmma.fence", nullptr, [](void* const*) {});
}
/// d = A B^T or d += A B^T, both with rows along K.
template <typename T, int tiles>
MOBA_DEVICE void wgmma_ss(float (&d)[tiles][4], std::uint64_t a, std::uint64_t b, bool add) {
  const GroupOperands own{&d[0][0], nullptr, a, b, add};
  emulation::group_product(&own, sizeof(own), run_group_product<T, tiles>);
}
/// d += A B, with A in registers and sums over B's rows.
template <typename T, int tiles>
MOBA_DEVICE void wgmma_rs(float (&d)[tiles][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  const GroupOperands own{&d[0][0], a, 0, b, true};
  emulation::group_product(&own, sizeof(own), run_group_product<T, tiles>);
}
MOBA_DEVICE void wgmma_commit() {
  emulation::group_commit();
}
/// Waits until at most the newest `pending` groups of this warpgroup's products are under way; `d` are sums
/// of those that have ended.
template <int pending = 0, int tiles>
MOBA_DEVICE void wgmma_wait(float (&)[tiles][4]) {
  emulation::group_wait(pending);
}
/// The registers of each thread of this warpgroup, from here on.
template <int registers>
MOBA_DEVICE void warpgroup_reg_dealloc() {
  emulation::group_collective("setmaxnreg.dec", nullptr, [](void* const*) {});
}
template <int registers>
MOBA_DEVICE void warpgroup_reg_alloc() {
  emulation::group_collective("setmaxnreg.inc", nullptr, [](void* const*) {});
}

#else

MOBA_DEVICE std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

/// Before the first product, and whenever the warpgroup's registers were written by other means.
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

/// d = A B^T or d += A B^T, both with rows along K.
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
  if constexpr (tiles == 8) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      MOBA_MULTIPLY_64("bf16");
    } else {
      MOBA_MULTIPLY_64("f16");
    }
  } else {
    if constexpr (std::is_same_v<T, bfloat16>) {
      MOBA_MULTIPLY_128("bf16");
    } else {
      MOBA_MULTIPLY_128("f16");
    }
  }
#undef MOBA_MULTIPLY_64
#undef MOBA_MULTIPLY_128
}

/// d += A B, with A in registers and sums over B's rows.
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
  if constexpr (tiles == 8) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      MOBA_MULTIPLY_64("bf16");
    } else {
      MOBA_MULTIPLY_64("f16");
    }
  } else {
    if constexpr (std::is_same_v<T, bfloat16>) {
      MOBA_MULTIPLY_128("bf16");
    } else {
      MOBA_MULTIPLY_128("f16");
    }
  }
#undef MOBA_MULTIPLY_64
#undef MOBA_MULTIPLY_128
}
MOBA_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most the newest `pending` groups of this warpgroup's products are under way; `d` are sums
/// of those that have ended: operands, so that nothing that reads them comes before.
template <int pending = 0, int tiles>
MOBA_DEVICE void wgmma_wait(float (&d)[tiles][4]) {
  static_assert(tiles == 8 || tiles == 16);
  if constexpr (tiles == 8) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : MOBA_SUMS_64 : "n"(pending) : "memory");
  } else {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : MOBA_SUMS_128 : "n"(pending) : "memory");
  }
}
#undef MOBA_SUMS_OF
#undef MOBA_SUMS_64
#undef MOBA_SUMS_128
#undef MOBA_NAMES_64
#undef MOBA_NAMES_128

/// The registers of each thread of this warpgroup, from here on.
template <int registers>
MOBA_DEVICE void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
MOBA_DEVICE void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

#endif

}  // namespace moba::cuda::ptx
