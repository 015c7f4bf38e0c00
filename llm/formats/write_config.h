#pragma once

#include <nlohmann/json.hpp>

#include "llm/config.h"

namespace moba::llm {

/// The `config.json` of `transformers` that describes a model of this shape, its weights in f32: what
/// read_config() reads back. Throws UsageError for RoPE divisors, which only GGUF can spell.
nlohmann::ordered_json config_json(const ModelConfig& config);

}  // namespace moba::llm
