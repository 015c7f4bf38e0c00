#pragma once

#include <string>

#include "llm/config.h"
#include "llm/formats/gguf.h"
#include "llm/formats/json.h"

namespace moba::llm {

/// Reads the shape of a model from a `config.json`, with the defaults of `transformers`. Throws DataError for
/// anything not implemented: another architecture, a sliding window, quantised weights, an unknown RoPE
/// scaling.
ModelConfig read_config(const JsonValue& root);

/// Reads it from the metadata and the tensors of a GGUF file, with the defaults of llama.cpp.
ModelConfig read_config(const GgufFile& file);

/// Throws a DataError that names `file` unless the key heads divide the query heads and head_dim is even.
void check_heads(const ModelConfig& config, const std::string& file);

}  // namespace moba::llm
