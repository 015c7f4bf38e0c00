#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "llm/formats/tensor.h"

namespace moba::llm {

/// Returns the bytes of a tensor of this shape, or nothing if they do not fit 63 bits or a row is not a whole
/// number of blocks. No size may be negative.
inline std::optional<std::uint64_t> stored_bytes(Storage storage, const std::vector<std::int64_t>& shape) {
  const StorageBlock block = block_of(storage);
  std::int64_t count = 1, bytes = 0;
  for (const std::int64_t size : shape) {
    if (__builtin_mul_overflow(count, size, &count)) return std::nullopt;
  }
  const std::int64_t row = shape.empty() ? 1 : shape.back();
  if (row % block.values != 0 || __builtin_mul_overflow(count / block.values, block.bytes, &bytes)) {
    return std::nullopt;
  }
  return static_cast<std::uint64_t>(bytes);
}

}  // namespace moba::llm
