#pragma once

#include "cuda/ptx/device.h"

namespace moba::cuda::ptx {

/// Encodes where an operand of wgmma lies (PTX ISA, "Matrix Descriptor Format"). Rows along K: 8-row cores
/// are `stride` bytes apart. Rows that are summed over: so are the cores of 8 steps of K, and every 64
/// columns lie `leading` bytes after the previous 64.
MOBA_DEVICE std::uint64_t matrix_descriptor(std::uint32_t address, std::uint32_t leading,
                                            std::uint32_t stride) {
  constexpr std::uint64_t kSwizzle128 = 1;
  return std::uint64_t{(address & 0x3FFFFU) >> 4} | std::uint64_t{leading >> 4} << 16 |
         std::uint64_t{stride >> 4} << 32 | kSwizzle128 << 62;
}

/// Moves the address of a descriptor by `bytes`, a constant multiple of 16: one addition to its lower word.
MOBA_DEVICE std::uint64_t advance_descriptor(std::uint64_t descriptor, std::uint32_t bytes) {
  return (descriptor & ~std::uint64_t{0xFFFFFFFFU}) | (static_cast<std::uint32_t>(descriptor) + (bytes >> 4));
}

}  // namespace moba::cuda::ptx
