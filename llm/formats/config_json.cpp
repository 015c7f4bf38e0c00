#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "llm/error.h"
#include "llm/formats/quoted.h"
#include "llm/formats/read_config.h"

namespace moba::llm {
namespace {

std::int64_t size_from(const JsonValue& value) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  const std::int64_t size = value.integer();
  if (size < 1 || size > kMax) value.fail(fmt::format("1 to {}", kMax), std::to_string(size));
  return size;
}

std::int64_t size_or(const JsonValue& object, const std::string& key, std::int64_t otherwise) {
  const auto value = object.find(key);
  return value ? size_from(*value) : otherwise;
}

bool flag_or(const JsonValue& object, const std::string& key, bool otherwise) {
  const auto value = object.find(key);
  return value ? value->boolean() : otherwise;
}

std::string text_or(const JsonValue& object, const std::string& key, const std::string& otherwise) {
  const auto value = object.find(key);
  return value ? value->string() : otherwise;
}

double positive(const JsonValue& value) {
  const double number = value.number();
  if (!(number > 0) || !std::isfinite(number)) value.fail("a number above 0", fmt::format("{}", number));
  return number;
}

double positive_or(const JsonValue& object, const std::string& key, double otherwise) {
  const auto value = object.find(key);
  return value ? positive(*value) : otherwise;
}

std::optional<double> number_if_there(const JsonValue& object, const std::string& key) {
  const auto value = object.find(key);
  if (!value) return std::nullopt;
  return value->number();
}

/// In YaRN a zero means unset, as in `transformers`.
double beta_or(const JsonValue& object, const std::string& key, double otherwise) {
  const auto value = number_if_there(object, key);
  return value && *value != 0 ? positive(object.at(key)) : otherwise;
}

void read_llama3(const JsonValue& rope, RopeScaling& scaling) {
  scaling.kind = RopeScaling::Kind::llama3;
  scaling.factor = positive(rope.at("factor"));
  scaling.low_freq_factor = positive(rope.at("low_freq_factor"));
  scaling.high_freq_factor = positive(rope.at("high_freq_factor"));
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    rope.at("high_freq_factor")
        .fail(fmt::format("a number above low_freq_factor {}", scaling.low_freq_factor),
              fmt::format("{}", scaling.high_freq_factor));
  }
}

void read_yarn(const JsonValue& rope, std::int64_t context, RopeScaling& scaling) {
  scaling.kind = RopeScaling::Kind::yarn;
  const double ratio = static_cast<double>(context) / static_cast<double>(scaling.original_context);
  scaling.factor = positive_or(rope, "factor", ratio);
  scaling.beta_fast = beta_or(rope, "beta_fast", scaling.beta_fast);
  scaling.beta_slow = beta_or(rope, "beta_slow", scaling.beta_slow);
  scaling.attention_factor = number_if_there(rope, "attention_factor");
  scaling.mscale = number_if_there(rope, "mscale");
  scaling.mscale_all_dim = number_if_there(rope, "mscale_all_dim");
  scaling.truncate = flag_or(rope, "truncate", true);
}

void read_scaling(const JsonValue& root, const JsonValue& rope, ModelConfig& config) {
  const std::string kind = text_or(rope, "rope_type", text_or(rope, "type", "default"));
  RopeScaling& scaling = config.rope;
  const std::int64_t original = size_or(rope, "original_max_position_embeddings", config.context);
  if (kind == "llama3" || kind == "yarn") {
    scaling.original_context = size_or(root, "original_max_position_embeddings", original);
  }
  if (kind == "linear") {
    scaling.kind = RopeScaling::Kind::linear;
    scaling.factor = positive(rope.at("factor"));
  } else if (kind == "llama3") {
    read_llama3(rope, scaling);
  } else if (kind == "yarn") {
    read_yarn(rope, config.context, scaling);
  } else if (kind != "default") {
    rope.fail("a RoPE scaling of type default, linear, llama3 or yarn", llm::quoted(kind));
  }
}

/// `rope_scaling`, the older name, takes precedence over `rope_parameters`, as in `transformers`.
std::optional<JsonValue> rope_of(const JsonValue& root) {
  const auto older = root.find("rope_scaling");
  return older && !older->object().empty() ? older : root.find("rope_parameters");
}

void read_rope(const JsonValue& root, ModelConfig& config) {
  const auto rope = rope_of(root);
  const JsonValue& home = rope && rope->find("rope_theta") ? *rope : root;
  config.rope_theta = positive_or(home, "rope_theta", config.rope_theta);
  if (config.rope_theta <= 1)
    home.at("rope_theta").fail("a number above 1", fmt::format("{}", config.rope_theta));
  const JsonValue& partial = rope && rope->find("partial_rotary_factor") ? *rope : root;
  const double rotated = positive_or(partial, "partial_rotary_factor", 1);
  if (rotated != 1) partial.at("partial_rotary_factor").fail("1", fmt::format("{}", rotated));
  if (!rope) return;
  for (const char* layers : {"full_attention", "sliding_attention"}) {
    if (rope->find(layers)) rope->fail("the same RoPE in every layer", fmt::format("a set for {}", layers));
  }
  read_scaling(root, *rope, config);
}

/// A window as long as the context is full attention.
void refuse_window(const JsonValue& root, std::optional<std::int64_t> otherwise, std::int64_t context) {
  const auto value = root.find("sliding_window");
  const bool is_null = root.object().contains("sliding_window") && !value;
  const auto window = value ? size_from(*value) : is_null ? std::nullopt : otherwise;
  if (!window || *window >= context) return;
  root.fail("full attention (sliding_window null)",
            fmt::format("a sliding window of {} tokens{}", *window, value ? "" : ", the default"));
}

/// In Qwen models single layers may have sliding windows, by a list or from a layer on.
bool has_sliding_layers(const JsonValue& root, std::int64_t layers) {
  if (const auto types = root.find("layer_types")) {
    bool slides = false;
    for (std::size_t i = 0; i < types->array().size(); ++i) {
      const JsonValue type = types->element(i);
      const bool is_sliding = type.string() == "sliding_attention";
      if (!is_sliding && type.string() != "full_attention")
        type.fail("full_attention", llm::quoted(type.string()));
      slides |= is_sliding;
    }
    return slides;
  }
  constexpr std::int64_t kFirstWindowLayer = 28;  // the default of both Qwen2 and Qwen3
  const auto first = number_if_there(root, "max_window_layers").value_or(kFirstWindowLayer);
  return flag_or(root, "use_sliding_window", false) && first < static_cast<double>(layers);
}

void read_architecture(const JsonValue& root, ModelConfig& config) {
  const JsonValue type = root.at("model_type");
  config.architecture = type.string();
  const std::string& name = config.architecture;
  if (name != "llama" && name != "mistral" && name != "qwen2" && name != "qwen3") {
    type.fail("llama, mistral, qwen2 or qwen3", llm::quoted(name));
  }
  const std::string activation = text_or(root, "hidden_act", "silu");
  if (activation != "silu") root.at("hidden_act").fail("silu", llm::quoted(activation));
  if (const auto quantised = root.find("quantization_config")) {
    quantised->fail(
        "weights in f32, f16 or bf16",
        "quantised ones: " + llm::quoted(text_or(*quantised, "quant_method", "by an unknown method")));
  }
}

void read_sizes(const JsonValue& root, ModelConfig& config) {
  config.layers = size_from(root.at("num_hidden_layers"));
  config.hidden = size_from(root.at("hidden_size"));
  config.intermediate = size_from(root.at("intermediate_size"));
  config.heads = size_from(root.at("num_attention_heads"));
  config.kv_heads = size_or(root, "num_key_value_heads", config.heads);
  config.vocab = size_from(root.at("vocab_size"));
  config.context = size_from(root.at("max_position_embeddings"));
  config.norm_eps = positive_or(root, "rms_norm_eps", 1e-6);
  constexpr std::int64_t kQwen3HeadDim = 128;
  config.head_dim = size_or(root, "head_dim", config.architecture == "qwen3" ? kQwen3HeadDim : 0);
  if (config.head_dim != 0) return;
  if (config.hidden % config.heads != 0) {
    root.at("num_attention_heads")
        .fail(fmt::format("a divisor of hidden_size {}, there being no head_dim", config.hidden),
              std::to_string(config.heads));
  }
  config.head_dim = config.hidden / config.heads;
}

std::int64_t count_or_none(const JsonValue& object, const std::string& key) {
  const auto value = object.find(key);
  return value && value->integer() == 0 ? 0 : size_or(object, key, 0);
}

/// Returns a number, or a list with one for each layer.
std::vector<std::int64_t> count_or_list(const JsonValue& root, const std::string& key, std::int64_t layers,
                                        std::int64_t low) {
  const auto value = root.find(key);
  if (!value) return {low};
  const auto count_of = [&](const JsonValue& number) {
    return low == 0 && number.integer() == 0 ? 0 : size_from(number);
  };
  if (!value->value().is_array()) return {count_of(*value)};
  std::vector<std::int64_t> counts;
  for (std::size_t i = 0; i < value->array().size(); ++i) counts.push_back(count_of(value->element(i)));
  if (static_cast<std::int64_t>(counts.size()) != layers)
    value->fail(fmt::format("{} numbers (one for each layer)", layers), std::to_string(counts.size()));
  return counts;
}

std::optional<TrainedAttention> trained_attention(const JsonValue& root, std::int64_t layers) {
  if (!root.find("moba_chunk_size") && !root.find("moba_topk")) return std::nullopt;
  root.at("moba_chunk_size"), root.at("moba_topk");  // both or neither
  const auto blocks = count_or_list(root, "moba_chunk_size", layers, 1),
             top_k = count_or_list(root, "moba_topk", layers, 1),
             sinks = count_or_list(root, "moba_sink", layers, 0);
  TrainedAttention moba{.block_size = blocks.front(),
                        .top_k = top_k.front(),
                        .sink_blocks = sinks.front(),
                        .full_tail = count_or_none(root, "moba_full_tail"),
                        .full_layers = {}};
  const std::size_t lists = std::max({blocks.size(), top_k.size(), sinks.size()});
  for (std::size_t l = 0; l < lists; ++l) {
    const auto at = [&](const std::vector<std::int64_t>& list) { return list[list.size() == 1 ? 0 : l]; };
    if (at(sinks) >= at(top_k)) {
      root.at("moba_sink").fail(fmt::format("fewer than moba_topk {}", at(top_k)), std::to_string(at(sinks)));
    }
    if (lists > 1)
      moba.layers.push_back({.block_size = at(blocks), .top_k = at(top_k), .sink_blocks = at(sinks)});
  }
  const auto full = root.find("moba_full_layers");
  for (std::size_t i = 0; full && i < full->array().size(); ++i) {
    const JsonValue value = full->element(i);
    const std::int64_t layer = value.integer();
    if (layer < 0 || layer >= layers) value.fail(fmt::format("0 to {}", layers - 1), std::to_string(layer));
    moba.full_layers.push_back({layer, layer});
  }
  return moba;
}

}  // namespace

ModelConfig read_config(const JsonValue& root) {
  ModelConfig config;
  read_architecture(root, config);
  read_sizes(root, config);
  read_rope(root, config);

  const std::string& name = config.architecture;
  const bool is_qwen = name == "qwen2" || name == "qwen3";
  if (name == "mistral") {
    constexpr std::int64_t kMistralWindow = 4096;
    refuse_window(root, kMistralWindow, config.context);
  } else if (is_qwen && has_sliding_layers(root, config.layers)) {
    refuse_window(root, 4096, config.context);
  }
  const bool has_attention_bias =
      name != "mistral" && name != "qwen2" && flag_or(root, "attention_bias", false);
  config.qkv_bias = name == "qwen2" || has_attention_bias;
  config.output_bias = has_attention_bias;
  config.mlp_bias = name == "llama" && flag_or(root, "mlp_bias", false);
  config.qk_norm = name == "qwen3";
  config.tied_embeddings = flag_or(root, "tie_word_embeddings", false);
  config.moba = trained_attention(root, config.layers);
  return config;
}

void check_heads(const ModelConfig& config, const std::string& file) {
  const auto fail = [&](const std::string& expected, std::int64_t found) {
    throw DataError(fmt::format("{}: expected {}, got {}", file, expected, found));
  };
  if (config.heads % config.kv_heads != 0) {
    fail(fmt::format("key heads to be a divisor of {} heads", config.heads), config.kv_heads);
  }
  if (config.head_dim % 2 != 0) fail("an even head size", config.head_dim);
}

}  // namespace moba::llm
