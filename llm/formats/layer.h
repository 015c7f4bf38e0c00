#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llm/config.h"

namespace moba::llm {

inline constexpr std::string_view kEmbeddingName = "model.embed_tokens", kFinalNormName = "model.norm",
                                  kHeadName = "lm_head";

/// A linear layer of a decoder layer by its name there ("self_attn.q_proj"), with weight [outputs, inputs].
struct LinearShape {
  std::string name;
  std::int64_t outputs, inputs;
  bool has_bias = false;
};

/// An RMSNorm of a decoder layer by its name there, with weight [size].
struct NormShape {
  std::string name;
  std::int64_t size;
};

/// The tensors of one decoder layer of the Llama family, as the runner and the trainer group them. The linear
/// layers of one group read the same input and are computed as one product, their weights below one another.
struct LayerShape {
  NormShape attention_norm;
  std::vector<LinearShape> qkv, output;
  std::vector<NormShape> qk_norms;  // of queries and of keys, or empty
  NormShape mlp_norm;
  std::vector<LinearShape> gate_up, down;
};

LayerShape layer_shape(const ModelConfig& config);

/// Returns every linear layer of a decoder layer, in the order of LayerShape.
std::vector<LinearShape> linears_of(const ModelConfig& config);

/// Returns the beginning of the Hugging Face names of a layer's tensors: "model.layers.0.".
std::string layer_prefix(std::int64_t layer);

}  // namespace moba::llm
