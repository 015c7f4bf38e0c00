#include "llm/formats/write_config.h"

#include "llm/error.h"

namespace moba::llm {
namespace {

const char* class_of(const std::string& architecture) {
  if (architecture == "mistral") return "MistralForCausalLM";
  if (architecture == "qwen2") return "Qwen2ForCausalLM";
  if (architecture == "qwen3") return "Qwen3ForCausalLM";
  return "LlamaForCausalLM";
}

nlohmann::ordered_json scaling_json(const RopeScaling& rope) {
  using Kind = RopeScaling::Kind;
  if (rope.kind == Kind::linear) return {{"rope_type", "linear"}, {"factor", rope.factor}};
  if (rope.kind == Kind::llama3) {
    return {{"rope_type", "llama3"},
            {"factor", rope.factor},
            {"low_freq_factor", rope.low_freq_factor},
            {"high_freq_factor", rope.high_freq_factor},
            {"original_max_position_embeddings", rope.original_context}};
  }
  nlohmann::ordered_json json{{"rope_type", "yarn"},
                              {"factor", rope.factor},
                              {"original_max_position_embeddings", rope.original_context},
                              {"beta_fast", rope.beta_fast},
                              {"beta_slow", rope.beta_slow},
                              {"truncate", rope.truncate}};
  if (rope.attention_factor) json["attention_factor"] = *rope.attention_factor;
  if (rope.mscale) json["mscale"] = *rope.mscale;
  if (rope.mscale_all_dim) json["mscale_all_dim"] = *rope.mscale_all_dim;
  return json;
}

void add_attention(nlohmann::ordered_json& json, const TrainedAttention& moba) {
  json["moba_chunk_size"] = moba.block_size;
  json["moba_topk"] = moba.top_k;
  json["moba_sink"] = moba.sink_blocks;
  if (!moba.layers.empty()) {
    for (const char* list : {"moba_chunk_size", "moba_topk", "moba_sink"})
      json[list] = nlohmann::json::array();
    for (const Routing& layer : moba.layers) {
      json["moba_chunk_size"].push_back(layer.block_size);
      json["moba_topk"].push_back(layer.top_k);
      json["moba_sink"].push_back(layer.sink_blocks);
    }
  }
  json["moba_full_tail"] = moba.full_tail;
  json["moba_full_layers"] = layers_in(moba.full_layers);
}

}  // namespace

nlohmann::ordered_json config_json(const ModelConfig& config) {
  if (!config.rope_divisors.empty()) {
    throw UsageError(
        "-m/--model: expected RoPE scaling that config.json can express, got divisors of single frequencies, "
        "as GGUF files of Llama 3 have them: train from the Hugging Face folder");
  }
  const std::string& name = config.architecture;
  nlohmann::ordered_json json{{"architectures", {class_of(name)}},
                              {"model_type", name},
                              {"vocab_size", config.vocab},
                              {"hidden_size", config.hidden},
                              {"intermediate_size", config.intermediate},
                              {"num_hidden_layers", config.layers},
                              {"num_attention_heads", config.heads},
                              {"num_key_value_heads", config.kv_heads},
                              {"head_dim", config.head_dim},
                              {"hidden_act", "silu"},
                              {"max_position_embeddings", config.context},
                              {"rms_norm_eps", config.norm_eps},
                              {"rope_theta", config.rope_theta},
                              {"tie_word_embeddings", config.tied_embeddings},
                              {"dtype", "float32"}};
  if (config.rope.kind != RopeScaling::Kind::none) json["rope_scaling"] = scaling_json(config.rope);
  if (name == "llama") {
    json["attention_bias"] = config.qkv_bias;
    json["mlp_bias"] = config.mlp_bias;
  } else if (name == "qwen3") {
    json["attention_bias"] = config.qkv_bias;
  } else if (name == "mistral") {
    json["sliding_window"] = nullptr;
  }
  if (config.moba) add_attention(json, *config.moba);
  return json;
}

}  // namespace moba::llm
