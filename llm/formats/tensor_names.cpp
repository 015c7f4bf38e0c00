#include "llm/formats/tensor_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace moba::llm {
namespace {

constexpr std::string_view kLayers = "model.layers.";

/// Names without ".weight" or ".bias"; those of layers without their number.
constexpr std::pair<std::string_view, std::string_view> kNames[] = {
    {"model.embed_tokens", "token_embd"},
    {"model.norm", "output_norm"},
    {"lm_head", "output"},
    {"input_layernorm", "attn_norm"},
    {"post_attention_layernorm", "ffn_norm"},
    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"self_attn.q_norm", "attn_q_norm"},
    {"self_attn.k_norm", "attn_k_norm"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},
};

void visit_layer(const ModelConfig& config, const std::string& layer, const VisitTensor& visit) {
  const std::int64_t hidden = config.hidden, intermediate = config.intermediate;
  const std::int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  const auto linear = [&](const char* name, std::int64_t outputs, std::int64_t inputs, bool has_bias) {
    visit(layer + name + ".weight", {outputs, inputs});
    if (has_bias) visit(layer + name + ".bias", {outputs});
  };
  visit(layer + "input_layernorm.weight", {hidden});
  linear("self_attn.q_proj", q, hidden, config.qkv_bias);
  linear("self_attn.k_proj", kv, hidden, config.qkv_bias);
  linear("self_attn.v_proj", kv, hidden, config.qkv_bias);
  linear("self_attn.o_proj", hidden, q, config.output_bias);
  if (config.qk_norm) {
    visit(layer + "self_attn.q_norm.weight", {config.head_dim});
    visit(layer + "self_attn.k_norm.weight", {config.head_dim});
  }
  visit(layer + "post_attention_layernorm.weight", {hidden});
  linear("mlp.gate_proj", intermediate, hidden, config.mlp_bias);
  linear("mlp.up_proj", intermediate, hidden, config.mlp_bias);
  linear("mlp.down_proj", hidden, intermediate, config.mlp_bias);
}

}  // namespace

void for_each_tensor(const ModelConfig& config, const VisitTensor& visit) {
  visit("model.embed_tokens.weight", {config.vocab, config.hidden});
  for (std::int64_t i = 0; i < config.layers; ++i)
    visit_layer(config, fmt::format("{}{}.", kLayers, i), visit);
  visit("model.norm.weight", {config.hidden});
  if (!config.tied_embeddings) visit("lm_head.weight", {config.vocab, config.hidden});
}

std::string gguf_name(std::string_view name) {
  std::string prefix;
  std::string_view stem = name.substr(0, name.rfind('.'));
  const std::string_view suffix = name.substr(stem.size());
  if (stem.starts_with(kLayers)) {
    stem.remove_prefix(kLayers.size());
    const std::string_view number = stem.substr(0, stem.find('.'));
    prefix = fmt::format("blk.{}.", number);
    stem.remove_prefix(std::min(number.size() + 1, stem.size()));
  }
  for (const auto& [theirs, ours] : kNames) {
    if (stem == theirs) return fmt::format("{}{}{}", prefix, ours, suffix);
  }
  return std::string(name);
}

}  // namespace moba::llm
