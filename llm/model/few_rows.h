#pragma once

#include <cstdint>
#include <vector>

#include "llm/formats/tensor.h"

namespace moba::llm {

/// Up to this many rows are multiplied by weights as the file stores them; more rows are multiplied faster by
/// expanded weights.
inline constexpr std::int64_t kFewRows = 8;

/// A few rows of activations, prepared for products with stored weights.
struct FewRows {
  /// [rows, columns], with any row stride. Not owned.
  const float* values = nullptr;
  std::int64_t rows = 0, columns = 0, stride = 0;

  /// [rows]: whether products with block formats round the activations of the row, so that value i is about
  /// level[i] * scale[i / 32]. Empty: no row is rounded.
  std::vector<std::uint8_t> is_rounded{};
  std::int64_t groups = 0;                      // of 32 columns, padded with zeros to whole vectors
  std::vector<std::int8_t> level{};             // [rows, groups * 32]
  std::vector<float> scale{}, sum{};            // [rows, groups]: of 32 rounded values, the scale and the sum
  std::vector<float> half_scale{}, half_sum{};  // [rows, groups * 2]: the same of 16
};

/// Rounds the activations to int8, one scale for 32 of them, as llama.cpp does. A row with a NaN or an
/// infinity, which int8 cannot hold, is not rounded.
void round_to_int8(FewRows& x);

/// Computes y[row][i] = x[row] . weight row `source[i]` for i in [first, last); y has rows of `y_stride`
/// floats. Products of rounded rows with block formats are exact products of the rounded values, summed in
/// f32; all others are f32 products.
void multiply_few_rows(const FewRows& x, const StoredTensor& weight, const std::int32_t* source,
                       std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride);

}  // namespace moba::llm
