#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moba::llm {

/// The storage type of a tensor on disk: the three float types, and GGUF's block formats.
enum class Storage : std::uint8_t {
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k
};

std::string_view name_of(Storage storage);

/// The block of a storage type: `values` numbers in `bytes` bytes. Rows are whole blocks.
struct StorageBlock {
  std::int64_t values, bytes;
};
StorageBlock block_of(Storage storage);

/// One tensor in a memory-mapped file: outermost dimension first, as PyTorch prints it.
struct StoredTensor {
  std::string name;
  Storage storage = Storage::f32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;

  /// Returns the number of elements; the readers have checked that they fit `bytes`.
  std::int64_t count() const;
  /// Returns the elements in a row, the last dimension.
  std::int64_t row_length() const { return shape.empty() ? 1 : shape.back(); }
  /// Returns the bytes of a row; rows follow one another.
  std::int64_t row_bytes() const;
};

}  // namespace moba::llm
