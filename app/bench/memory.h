#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "moba/tensor.h"

namespace moba::bench {

/// A large buffer on huge pages where the system grants them, untouched.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes);

  std::byte* data() const { return data_.get(); }
  std::span<std::byte> bytes() const { return {data_.get(), size_}; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte[], Free> data_;
  std::size_t size_ = 0;
};

/// A contiguous tensor [tokens, heads, head_dim] and its memory.
struct Array {
  Array() = default;
  Array(DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim);

  Memory memory;
  Tensor tensor;
};

/// Tokens [first, first + count) of a view.
Tensor rows_of(Tensor tensor, std::int64_t first, std::int64_t count);

/// Element `index` from the start of a view over contiguous memory, in any of f32, bf16, f16.
float get(const Tensor& tensor, std::int64_t index);
void set(const Tensor& tensor, std::int64_t index, float value);

/// NaN in every float type.
void poison(std::span<std::byte> bytes);

std::size_t available_memory();
std::int64_t peak_rss_bytes();

}  // namespace moba::bench
