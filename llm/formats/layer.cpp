#include "llm/formats/layer.h"

#include <fmt/format.h>

namespace moba::llm {

LayerShape layer_shape(const ModelConfig& config) {
  const std::int64_t hidden = config.hidden, intermediate = config.intermediate;
  const std::int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  LayerShape layer{.attention_norm = {"input_layernorm", hidden},
                   .qkv = {{"self_attn.q_proj", q, hidden, config.qkv_bias},
                           {"self_attn.k_proj", kv, hidden, config.qkv_bias},
                           {"self_attn.v_proj", kv, hidden, config.qkv_bias}},
                   .output = {{"self_attn.o_proj", hidden, q, config.output_bias}},
                   .qk_norms = {},
                   .mlp_norm = {"post_attention_layernorm", hidden},
                   .gate_up = {{"mlp.gate_proj", intermediate, hidden, config.mlp_bias},
                               {"mlp.up_proj", intermediate, hidden, config.mlp_bias}},
                   .down = {{"mlp.down_proj", hidden, intermediate, config.mlp_bias}}};
  if (config.qk_norm) {
    layer.qk_norms = {{"self_attn.q_norm", config.head_dim}, {"self_attn.k_norm", config.head_dim}};
  }
  return layer;
}

std::vector<LinearShape> linears_of(const ModelConfig& config) {
  const LayerShape layer = layer_shape(config);
  std::vector<LinearShape> linears;
  for (const auto* group : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down})
    linears.insert(linears.end(), group->begin(), group->end());
  return linears;
}

std::string layer_prefix(std::int64_t layer) {
  return fmt::format("model.layers.{}.", layer);
}

}  // namespace moba::llm
