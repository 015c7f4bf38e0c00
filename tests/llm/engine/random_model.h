#pragma once

#include "llm/config.h"
#include "llm/model/model.h"

namespace moba::llm::test {

/// Returns the shape of a small Llama with GQA.
ModelConfig small_config();

/// Returns a model of random f32 weights in f32 arithmetic, made from the same files every time.
Model random_model(const ModelConfig& config);

}  // namespace moba::llm::test
