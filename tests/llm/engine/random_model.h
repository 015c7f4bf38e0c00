#pragma once

#include "llm/config.h"
#include "llm/formats/weights.h"
#include "llm/model/model.h"

namespace moba::llm::test {

/// Returns the shape of a small Llama with GQA.
ModelConfig small_config();

/// Returns random f32 weights, equal for equal shapes and seeds.
Weights random_weights(const ModelConfig& config, unsigned seed = 1);
/// Returns a model of these weights in f32 arithmetic.
Model random_model(const ModelConfig& config);

}  // namespace moba::llm::test
