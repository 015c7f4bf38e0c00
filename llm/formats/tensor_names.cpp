#include "llm/formats/tensor_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "llm/formats/layer.h"

namespace moba::llm {
namespace {

constexpr std::string_view kLayers = "model.layers.";

/// Pairs of names without ".weight" or ".bias"; those of layers without their number.
constexpr std::pair<std::string_view, std::string_view> kNames[] = {
    {kEmbeddingName, "token_embd"},
    {kFinalNormName, "output_norm"},
    {kHeadName, "output"},
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

void visit_layer(const ModelConfig& config, const std::string& prefix, const VisitTensor& visit) {
  const LayerShape layer = layer_shape(config);
  const auto norm = [&](const NormShape& shape) { visit(prefix + shape.name + ".weight", {shape.size}); };
  const auto linears = [&](const std::vector<LinearShape>& group) {
    for (const LinearShape& linear : group) {
      visit(prefix + linear.name + ".weight", {linear.outputs, linear.inputs});
      if (linear.has_bias) visit(prefix + linear.name + ".bias", {linear.outputs});
    }
  };
  norm(layer.attention_norm);
  linears(layer.qkv);
  linears(layer.output);
  for (const NormShape& shape : layer.qk_norms) norm(shape);
  norm(layer.mlp_norm);
  linears(layer.gate_up);
  linears(layer.down);
}

}  // namespace

void for_each_tensor(const ModelConfig& config, const VisitTensor& visit) {
  visit(fmt::format("{}.weight", kEmbeddingName), {config.vocab, config.hidden});
  for (std::int64_t i = 0; i < config.layers; ++i) visit_layer(config, layer_prefix(i), visit);
  visit(fmt::format("{}.weight", kFinalNormName), {config.hidden});
  if (!config.tied_embeddings) visit(fmt::format("{}.weight", kHeadName), {config.vocab, config.hidden});
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
