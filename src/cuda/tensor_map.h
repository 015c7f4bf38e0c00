#pragma once

#include <cstddef>
#include <cstdint>

#include "moba/tensor.h"

namespace moba::cuda {

/// What the hardware's bulk copies must know of a tensor [tokens, heads, D] of 16-bit elements: that it comes
/// in boxes of kColumns elements of one head and a number of tokens, which lie in shared memory as rows of
/// 128 bytes with their 16-byte pieces permuted (CU_TENSOR_MAP_SWIZZLE_128B). Only the driver can make one.
struct TensorMap {
  static constexpr int kColumns = 64;
  alignas(64) std::byte opaque[128]{};
};

}  // namespace moba::cuda
