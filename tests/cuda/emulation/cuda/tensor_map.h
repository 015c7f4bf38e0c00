#pragma once

#include <cstddef>
#include <cstdint>

#include "moba/tensor.h"

namespace moba::cuda {

/// Replaces src/cuda/tensor_map.h: the arguments of cuTensorMapEncodeTiled.
struct TensorMap {
  static constexpr int kColumns = 64;
  const std::byte* data = nullptr;
  std::int64_t sizes[3]{}, strides[2]{};  // strides in bytes
  int rows = 0;
};

}  // namespace moba::cuda
