#pragma once

#include <cstdint>
#include <vector>

#include "moba/tensor.h"

namespace moba::test {

/// Memory layout of [tokens, heads, head_dim].
/// `aligned`: heads before tokens, with gaps of whole 16-byte vectors.
enum class Layout { contiguous, padded, heads_first, reversed, shared_heads, aligned };

const char* name_of(Layout layout);

/// A tensor with its memory. Bytes between and around the elements hold a pattern that reads as NaN, to
/// detect reads and writes outside of them.
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
        Layout layout = Layout::contiguous);

  Tensor view() const;
  /// Tokens [first, first + count).
  Tensor slice(std::int64_t first, std::int64_t count) const;
  double get(std::int64_t token, std::int64_t head, std::int64_t d) const;
  void set(std::int64_t token, std::int64_t head, std::int64_t d, double value);
  /// Returns whether every byte between and around the elements still holds the pattern.
  bool gaps_untouched() const;
  const std::vector<std::byte>& bytes() const { return bytes_; }

  std::int64_t tokens() const { return tokens_; }
  std::int64_t heads() const { return heads_; }
  std::int64_t head_dim() const { return head_dim_; }
  DType dtype() const { return dtype_; }

 private:
  std::int64_t offset(std::int64_t token, std::int64_t head, std::int64_t d) const;

  DType dtype_ = DType::f32;
  std::int64_t tokens_ = 0, heads_ = 0, head_dim_ = 0;
  std::int64_t first_ = 0, token_stride_ = 0, head_stride_ = 0;
  std::vector<std::byte> bytes_;
};

/// Returns the largest magnitude of any element.
double largest(const Array& array);

/// Returns the nearest value that `dtype` can represent.
double rounded(double value, DType dtype);

}  // namespace moba::test
