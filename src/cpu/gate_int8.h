#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/matrix_tiles.h"
#include "cpu/sizes.h"

/// int8 screening: scores in int8, each with a bound of its error, so that only a handful of blocks need
/// their exact f32 score. The selection is bit-identical to that of the f32 gate. See docs/mathematics.md,
/// "The exact int8 gate".
namespace moba::cpu {

/// Block means rounded to int8 with one scale each, in panels of kMatrixCols, and what the bound needs: |c|,
/// |c - scale round(c)| and 128 times the sum of the rounded values (rows are stored as unsigned, 128 too
/// high).
struct ScreenedMeans {
  std::int8_t* panels = nullptr;  // [panels][depth / 4][kMatrixCols][4]
  float* scale = nullptr;
  float* norm = nullptr;
  float* error = nullptr;
  std::int32_t* offset = nullptr;

  static std::size_t depth(std::int64_t head_dim) {
    return round_up(static_cast<std::size_t>(head_dim), kInt8Depth);
  }
  static std::size_t padded(std::int64_t blocks) {
    return round_up(static_cast<std::size_t>(blocks), kMatrixCols);
  }
  static std::size_t bytes(std::int64_t blocks, std::int64_t head_dim) {
    return padded(blocks) * (depth(head_dim) + 3 * sizeof(float) + sizeof(std::int32_t));
  }
  static ScreenedMeans in(std::byte* memory, std::int64_t blocks, std::int64_t head_dim) {
    const std::size_t count = padded(blocks);
    auto* floats = reinterpret_cast<float*>(memory + count * depth(head_dim));
    return {reinterpret_cast<std::int8_t*>(memory), floats, floats + count, floats + 2 * count,
            reinterpret_cast<std::int32_t*>(floats + 3 * count)};
  }
};

/// Fewest candidates for which screening is faster, as measured; and rows screened together.
constexpr std::int64_t kScreenFrom = 2048, kScreenRows = 448;
/// Survivors that a row may hold before they are scored in f32.
constexpr std::int64_t kMaxSurvivors = 128;

}  // namespace moba::cpu
