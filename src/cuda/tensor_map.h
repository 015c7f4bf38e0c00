#pragma once

#include <cstddef>
#include <cstdint>

#include "moba/tensor.h"

namespace moba::cuda {

/// TMA descriptor of a tensor [tokens, heads, D] of 16-bit elements: boxes of kColumns elements of one head
/// and a number of tokens, in shared memory rows of 128 bytes with swizzled 16-byte vectors
/// (CU_TENSOR_MAP_SWIZZLE_128B). Only the driver can make one.
struct TensorMap {
  static constexpr int kColumns = 64;
  alignas(64) std::byte opaque[128]{};
};

}  // namespace moba::cuda
