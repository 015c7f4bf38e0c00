#include "array.h"

#include <algorithm>
#include <cmath>

#include "number.h"

namespace moba::test {
namespace {

/// Byte of which any repetition is a NaN of a storage type.
constexpr std::byte kPattern{0xFF};
/// Elements before the first and after the last.
constexpr std::int64_t kMargin = 8;

}  // namespace

const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::contiguous:
      return "contiguous";
    case Layout::padded:
      return "padded";
    case Layout::heads_first:
      return "heads_first";
    case Layout::reversed:
      return "reversed";
    case Layout::shared_heads:
      return "shared_heads";
    case Layout::aligned:
      return "aligned";
  }
  return "?";
}

Array::Array(DType dtype, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, Layout layout)
    : dtype_(dtype), tokens_(tokens), heads_(heads), head_dim_(head_dim) {
  std::int64_t elements = 0;
  switch (layout) {
    case Layout::contiguous:
    case Layout::reversed:
      head_stride_ = head_dim;
      token_stride_ = heads * head_dim;
      elements = tokens * token_stride_;
      break;
    case Layout::padded:
      head_stride_ = head_dim + 3;
      token_stride_ = heads * head_stride_ + 5;
      elements = tokens * token_stride_;
      break;
    case Layout::heads_first:
      token_stride_ = head_dim + 1;
      head_stride_ = tokens * token_stride_;
      elements = heads * head_stride_;
      break;
    case Layout::aligned:
      token_stride_ = head_dim + 8;
      head_stride_ = tokens * token_stride_ + 16;
      elements = heads * head_stride_;
      break;
    case Layout::shared_heads:
      head_stride_ = 0;
      token_stride_ = head_dim;
      elements = tokens * token_stride_;
      break;
  }
  first_ = kMargin;
  if (layout == Layout::reversed && tokens > 0) {
    first_ += (tokens - 1) * token_stride_;
    token_stride_ = -token_stride_;
  }
  bytes_.assign(static_cast<std::size_t>(elements + 2 * kMargin) * size_of(dtype), kPattern);
}

std::int64_t Array::offset(std::int64_t token, std::int64_t head, std::int64_t d) const {
  return first_ + token * token_stride_ + head * head_stride_ + d;
}

Tensor Array::view() const {
  return slice(0, tokens_);
}

Tensor Array::slice(std::int64_t first, std::int64_t count) const {
  const std::int64_t begin = (first_ + first * token_stride_) * static_cast<std::int64_t>(size_of(dtype_));
  return {.data = const_cast<std::byte*>(bytes_.data()) + begin,
          .dtype = dtype_,
          .rank = 3,
          .sizes = {count, heads_, head_dim_},
          .strides = {token_stride_, head_stride_, 1}};
}

double Array::get(std::int64_t token, std::int64_t head, std::int64_t d) const {
  return load(bytes_.data(), dtype_, offset(token, head, d));
}

void Array::set(std::int64_t token, std::int64_t head, std::int64_t d, double value) {
  store(bytes_.data(), dtype_, offset(token, head, d), value);
}

bool Array::gaps_untouched() const {
  std::vector<bool> element(bytes_.size() / size_of(dtype_), false);
  for (std::int64_t token = 0; token < tokens_; ++token) {
    for (std::int64_t head = 0; head < heads_; ++head) {
      for (std::int64_t d = 0; d < head_dim_; ++d)
        element[static_cast<std::size_t>(offset(token, head, d))] = true;
    }
  }
  for (std::size_t i = 0; i < bytes_.size(); ++i) {
    if (!element[i / size_of(dtype_)] && bytes_[i] != kPattern) return false;
  }
  return true;
}

double largest(const Array& array) {
  double max_magnitude = 0;
  for (std::int64_t token = 0; token < array.tokens(); ++token) {
    for (std::int64_t head = 0; head < array.heads(); ++head) {
      for (std::int64_t d = 0; d < array.head_dim(); ++d)
        max_magnitude = std::max(max_magnitude, std::fabs(array.get(token, head, d)));
    }
  }
  return max_magnitude;
}

double rounded(double value, DType dtype) {
  double storage = 0;
  store(&storage, dtype, 0, value);
  return load(&storage, dtype, 0);
}

}  // namespace moba::test
