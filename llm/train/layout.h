#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llm/config.h"

namespace moba::llm::train {

/// The offsets of named tensors in one flat array of floats: matrices first, which weight decay applies to,
/// then vectors, which it does not. So an optimiser is two loops, and consecutive matrices (q, k, v; gate,
/// up) are one matrix, too.
class Layout {
 public:
  struct Entry {
    std::string name;
    std::vector<std::int64_t> shape;
    std::int64_t offset, count;
  };

  /// Adds a tensor, matrices before vectors.
  void add(const std::string& name, const std::vector<std::int64_t>& shape);

  const std::vector<Entry>& entries() const { return entries_; }
  /// Returns the entry of this name, which must exist.
  const Entry& at(std::string_view name) const;
  /// Returns the number of floats in matrices, and in all.
  std::int64_t matrices() const { return matrices_; }
  std::int64_t size() const { return size_; }

 private:
  std::vector<Entry> entries_;
  std::int64_t matrices_ = 0, size_ = 0;
};

/// Returns the layout of all tensors of a model of this shape, under their Hugging Face names.
Layout layout_of(const ModelConfig& config);

}  // namespace moba::llm::train
