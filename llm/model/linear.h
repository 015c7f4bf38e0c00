#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "llm/formats/layer.h"
#include "llm/formats/weights.h"
#include "llm/model/arithmetic.h"

namespace moba::llm {

/// A vector of the model by its Hugging Face name, in f32.
at::Tensor load_vector(const Weights& weights, const std::string& name, std::int64_t size);

/// Linear layers that read the same input, y = x W^T + b with their outputs side by side. The weights stay in
/// the file's mapping, in its format: a few rows are multiplied by them as they lie, more rows by tiles
/// expanded to the dtype of the product.
class Linear {
 public:
  Linear() = default;
  /// The weights "<prefix><name>.weight" of `group`, and the biases of those that have one.
  Linear(const Weights& weights, const std::string& prefix, const std::vector<LinearShape>& group);

  std::int64_t outputs() const { return outputs_; }

  /// Writes y [n, outputs] for x [n, inputs], of one dtype; rows of y may be strided. Up to kFewRows rows are
  /// f32.
  void operator()(const at::Tensor& x, const at::Tensor& y, const Arithmetic& arithmetic) const;
  /// The same for any number of f32 rows, each with the bits that it has alone.
  void by_rows(const at::Tensor& x, const at::Tensor& y, const Arithmetic& arithmetic) const;

 private:
  struct Part {
    const StoredTensor* weight;
    std::int64_t rows;
    /// The stored row of each row; empty if they are in order.
    std::vector<std::int32_t> source;
  };
  template <typename Body>
  void each_part(std::int64_t first, std::int64_t last, const Body& body) const;
  void multiply_few(const at::Tensor& x, const at::Tensor& y, bool round) const;
  void multiply_expanded(const at::Tensor& x, const at::Tensor& y) const;
  void expand(std::int64_t first, const at::Tensor& tile) const;

  std::int64_t inputs_ = 0, outputs_ = 0;
  std::vector<Part> parts_;
  at::Tensor bias_;  // [outputs] in f32, or undefined
};

}  // namespace moba::llm
