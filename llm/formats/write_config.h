#pragma once

#include <nlohmann/json.hpp>

#include "llm/config.h"

namespace moba::llm {

/// Returns the `config.json` of `transformers` for a model of this shape with weights in f32, the inverse of
/// read_config(). Throws UsageError for RoPE divisors, which only GGUF can express.
nlohmann::ordered_json config_json(const ModelConfig& config);

}  // namespace moba::llm
