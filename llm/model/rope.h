#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "llm/config.h"

namespace moba::llm {

/// Rotary position embedding (arXiv 2104.09864) in the rotate-half order of Hugging Face: element i of a head
/// is rotated together with element i + D/2.
struct Rope {
  /// [D/2], radians per token.
  std::vector<float> frequencies;
  /// Scales cos and sin (YaRN); 1 elsewhere.
  double magnitude = 1;
};

/// Returns the frequencies of a model, context extension included: linear, Llama 3's bands, or YaRN (arXiv
/// 2309.00071).
Rope make_rope(const ModelConfig& config);

/// Returns rows [first, first + count) of the rotation table: [count, D], cosines before sines.
std::vector<float> rope_rows(const Rope& rope, std::int64_t first, std::int64_t count);
/// Returns the rows of `positions`.
std::vector<float> rope_rows(const Rope& rope, std::span<const std::int64_t> positions);

}  // namespace moba::llm
