#pragma once

#include <string>

#include "llm/config.h"
#include "llm/formats/gguf.h"
#include "llm/formats/json.h"

namespace moba::llm {

/// The shape of the model that a `config.json` describes, with the defaults of `transformers`. What we would
/// compute differently than the model was trained (another architecture, a sliding window, quantised weights,
/// an unknown RoPE scaling) is a DataError.
ModelConfig read_config(const JsonValue& root);

/// The same from the metadata and the tensors of a GGUF file, with the defaults of llama.cpp.
ModelConfig read_config(const GgufFile& file);

/// Throws a DataError that names `file` for heads that do not fit together.
void check_heads(const ModelConfig& config, const std::string& file);

}  // namespace moba::llm
