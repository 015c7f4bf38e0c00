#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "llm/formats/weights.h"

namespace moba::llm {

/// Converts stored tensors to the working dtype, by their Hugging Face names. Weights::open has checked that
/// they exist and have the requested shapes.
class Loader {
 public:
  Loader(const Weights& weights, at::ScalarType dtype) : weights_(weights), dtype_(dtype) {}

  struct Part {
    std::string name;
    std::int64_t rows;
  };
  /// Concatenates matrices by rows, [sum of rows, columns]: one product instead of several.
  at::Tensor matrix(const std::vector<Part>& parts, std::int64_t columns) const;
  /// Concatenates vectors, in the working dtype.
  at::Tensor bias(const std::vector<Part>& parts) const;
  /// Returns a vector in f32.
  at::Tensor norm(const std::string& name, std::int64_t size) const;

 private:
  void read_rows(const std::string& name, const at::Tensor& rows) const;
  void read_vector(const std::string& name, const at::Tensor& out) const;

  const Weights& weights_;
  at::ScalarType dtype_;
};

}  // namespace moba::llm
