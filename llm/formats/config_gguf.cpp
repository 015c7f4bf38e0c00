#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "llm/error.h"
#include "llm/formats/dequantise.h"
#include "llm/formats/quoted.h"
#include "llm/formats/read_config.h"

namespace moba::llm {
namespace {

/// The metadata whose keys begin with a name, mostly that of the architecture.
class Keys {
 public:
  Keys(const GgufFile& file, const std::string& name) : file_(file), prefix_(name + ".") {}

  std::optional<GgufValue> find(const std::string& key) const { return file_.find(prefix_ + key); }

  std::int64_t size(const std::string& key) const { return size_from(file_.at(prefix_ + key)); }

  std::int64_t size_or(const std::string& key, std::int64_t otherwise) const {
    const auto value = find(key);
    return value ? size_from(*value) : otherwise;
  }

  std::int64_t count_or_none(const std::string& key) const {
    const auto value = find(key);
    return !value || value->integer() == 0 ? 0 : size_from(*value);
  }

  double positive_or(const std::string& key, double otherwise) const {
    const auto value = find(key);
    if (!value) return otherwise;
    const double number = value->number();
    if (!(number > 0) || !std::isfinite(number)) value->fail("a number above 0", fmt::format("{}", number));
    return number;
  }

  void expect_size(const std::string& key, std::int64_t expected) const {
    const std::int64_t found = size_or(key, expected);
    if (found != expected) find(key)->fail(std::to_string(expected), std::to_string(found));
  }

 private:
  /// Returns a size, which files may list layer by layer.
  static std::int64_t size_from(const GgufValue& value) {
    constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
    std::int64_t size = 0;
    if (value.is_array()) {
      const auto sizes = value.integers();
      const bool is_one = !sizes.empty() && std::all_of(sizes.begin(), sizes.end(), [&](std::int64_t other) {
        return other == sizes[0];
      });
      if (!is_one) value.fail("the same in every layer", "different layers");
      size = sizes[0];
    } else {
      size = value.integer();
    }
    if (size < 1 || size > kMax) value.fail(fmt::format("1 to {}", kMax), std::to_string(size));
    return size;
  }

  const GgufFile& file_;
  std::string prefix_;
};

const StoredTensor* tensor_of(const GgufFile& file, std::string_view name) {
  const auto tensor = std::find_if(file.tensors().begin(), file.tensors().end(),
                                   [&](const StoredTensor& candidate) { return candidate.name == name; });
  return tensor == file.tensors().end() ? nullptr : &*tensor;
}

void refuse_other_kinds(const Keys& keys, std::int64_t context) {
  if (const auto experts = keys.find("expert_count"); experts && experts->integer() != 0) {
    experts->fail("a model without experts", std::to_string(experts->integer()));
  }
  const auto window = keys.find("attention.sliding_window");
  if (window && window->integer() != 0 && window->integer() < context) {
    window->fail("full attention, no sliding window", fmt::format("{} tokens", window->integer()));
  }
  if (const auto causal = keys.find("attention.causal"); causal && !causal->boolean()) {
    causal->fail("causal attention", "false");
  }
}

void read_yarn(const Keys& keys, RopeScaling& scaling) {
  scaling.kind = RopeScaling::Kind::yarn;
  scaling.beta_fast = keys.positive_or("rope.scaling.yarn_beta_fast", scaling.beta_fast);
  scaling.beta_slow = keys.positive_or("rope.scaling.yarn_beta_slow", scaling.beta_slow);
  // llama.cpp multiplies its own factor with YaRN's; `attention_factor` is the product.
  const double own = keys.positive_or("rope.scaling.attn_factor", 1);
  if (own != 1) scaling.attention_factor = own * (1 + 0.1 * std::log(std::max(scaling.factor, 1.0)));
  if (const auto mix = keys.find("rope.scaling.yarn_ext_factor"); mix && mix->number() != 1) {
    mix->fail("1", fmt::format("{}", mix->number()));
  }
}

void read_scaling(const Keys& keys, ModelConfig& config) {
  RopeScaling& scaling = config.rope;
  const double older = keys.positive_or("rope.scale_linear", 1);
  const auto type = keys.find("rope.scaling.type");
  const std::string kind(type ? type->string() : older != 1 ? "linear" : "none");
  if (kind == "none") return;
  scaling.factor = keys.positive_or("rope.scaling.factor", older);
  scaling.original_context = keys.size_or("rope.scaling.original_context_length", config.context);
  if (kind == "linear") {
    scaling.kind = RopeScaling::Kind::linear;
  } else if (kind == "yarn") {
    read_yarn(keys, scaling);
  } else {
    type->fail("none, linear or yarn", llm::quoted(kind));
  }
}

/// Llama 3's scaling comes as one divisor for every frequency.
void read_divisors(const GgufFile& file, ModelConfig& config) {
  const StoredTensor* divisors = tensor_of(file, "rope_freqs.weight");
  if (!divisors) return;
  const std::int64_t expected = config.head_dim / 2;
  if (divisors->storage != Storage::f32 || divisors->shape != std::vector<std::int64_t>{expected}) {
    throw DataError(fmt::format("{}: expected tensor 'rope_freqs.weight' to be F32 [{}], got {} [{}]",
                                file.name(), expected, name_of(divisors->storage),
                                fmt::join(divisors->shape, ", ")));
  }
  config.rope_divisors.resize(static_cast<std::size_t>(expected));
  dequantise(*divisors, 0, 1, config.rope_divisors.data());
  const auto bad = std::find_if(config.rope_divisors.begin(), config.rope_divisors.end(),
                                [](float divisor) { return !(divisor > 0) || !std::isfinite(divisor); });
  if (bad != config.rope_divisors.end()) {
    throw DataError(fmt::format("{}: expected tensor 'rope_freqs.weight' to hold numbers above 0, got {}",
                                file.name(), *bad));
  }
}

void read_sizes(const GgufFile& file, const Keys& keys, ModelConfig& config) {
  config.layers = keys.size("block_count");
  config.hidden = keys.size("embedding_length");
  config.intermediate = keys.size("feed_forward_length");
  config.heads = keys.size("attention.head_count");
  config.kv_heads = keys.size_or("attention.head_count_kv", config.heads);
  config.context = keys.size("context_length");
  config.norm_eps = keys.positive_or("attention.layer_norm_rms_epsilon", config.norm_eps);
  config.head_dim = keys.size_or("attention.key_length", config.hidden / config.heads);
  keys.expect_size("attention.value_length", config.head_dim);
  keys.expect_size("rope.dimension_count", config.head_dim);
  const StoredTensor* embeddings = tensor_of(file, "token_embd.weight");
  if (!embeddings)
    throw DataError(fmt::format("{}: expected tensor 'token_embd.weight', got none", file.name()));
  config.vocab = embeddings->shape.front();
}

/// Returns the settings of the training with MoBA, which are named as in config.json, with "moba." for
/// "moba_".
std::optional<TrainedAttention> trained_attention(const GgufFile& file, std::int64_t layers) {
  const Keys keys(file, "moba");
  if (!keys.find("chunk_size") && !keys.find("topk")) return std::nullopt;
  TrainedAttention moba{.block_size = keys.size("chunk_size"),
                        .top_k = keys.size("topk"),
                        .sink_blocks = keys.count_or_none("sink"),
                        .full_tail = keys.count_or_none("full_tail"),
                        .full_layers = {}};
  if (moba.sink_blocks >= moba.top_k) {
    keys.find("sink")->fail(fmt::format("fewer than moba.topk {}", moba.top_k),
                            std::to_string(moba.sink_blocks));
  }
  const auto full = keys.find("full_layers");
  for (const std::int64_t layer : full ? full->integers() : std::vector<std::int64_t>()) {
    if (layer < 0 || layer >= layers) full->fail(fmt::format("0 to {}", layers - 1), std::to_string(layer));
    moba.full_layers.push_back({layer, layer});
  }
  return moba;
}

}  // namespace

ModelConfig read_config(const GgufFile& file) {
  ModelConfig config;
  const GgufValue architecture = file.at("general.architecture");
  config.architecture = architecture.string();
  const std::string& name = config.architecture;
  if (name != "llama" && name != "qwen2" && name != "qwen3") {
    architecture.fail("llama (Mistral too), qwen2 or qwen3", llm::quoted(name));
  }
  const Keys keys(file, name);
  read_sizes(file, keys, config);
  refuse_other_kinds(keys, config.context);
  config.rope_theta = keys.positive_or("rope.freq_base", config.rope_theta);
  if (config.rope_theta <= 1) {
    keys.find("rope.freq_base")->fail("a number above 1", fmt::format("{}", config.rope_theta));
  }
  read_scaling(keys, config);
  read_divisors(file, config);
  config.qkv_bias = name == "qwen2" || tensor_of(file, "blk.0.attn_q.bias");
  config.output_bias = tensor_of(file, "blk.0.attn_output.bias");
  config.mlp_bias = tensor_of(file, "blk.0.ffn_gate.bias");
  config.qk_norm = name == "qwen3";
  config.tied_embeddings = !tensor_of(file, "output.weight");
  config.moba = trained_attention(file, config.layers);
  return config;
}

}  // namespace moba::llm
