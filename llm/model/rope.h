#pragma once

#include <cstdint>
#include <vector>

#include "llm/config.h"

namespace moba::llm {

/// Rotary position embedding (arXiv 2104.09864) in the rotate-half order of Hugging Face: element i of a head
/// is turned together with element i + D/2.
struct Rope {
  /// [D/2], radians a token.
  std::vector<float> frequencies;
  /// Scales cos and sin (YaRN); 1 elsewhere.
  double magnitude = 1;
};

/// The frequencies of a model, context extension included: linear, Llama 3's bands, or YaRN (arXiv
/// 2309.00071).
Rope make_rope(const ModelConfig& config);

/// Rows [first, first + count) of the table that turns a head: [count, D], cosines before sines.
std::vector<float> rope_rows(const Rope& rope, std::int64_t first, std::int64_t count);

}  // namespace moba::llm
