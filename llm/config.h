#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "moba/attention.h"

namespace moba::llm {

/// The scaling of positions beyond the trained context (`rope_scaling` / `rope_parameters` in config.json,
/// `rope.scaling.*` in GGUF). Fields that a kind does not use keep their defaults.
struct RopeScaling {
  enum class Kind : std::uint8_t { none, linear, llama3, yarn };
  Kind kind = Kind::none;
  double factor = 1;
  std::int64_t original_context = 0;
  double low_freq_factor = 1, high_freq_factor = 4;                // llama3
  double beta_fast = 32, beta_slow = 1;                            // yarn
  std::optional<double> attention_factor, mscale, mscale_all_dim;  // yarn
  bool truncate = true;                                            // yarn
};

/// Layers [first, last], counted from 0.
struct LayerRange {
  std::int64_t first, last;
};

inline std::vector<std::int64_t> layers_in(const std::vector<LayerRange>& ranges) {
  std::vector<std::int64_t> layers;
  for (const LayerRange& range : ranges) {
    for (std::int64_t layer = range.first; layer <= range.last; ++layer) layers.push_back(layer);
  }
  return layers;
}

/// The attention of a model that was trained with MoBA; config.json names its fields as the program's flags.
struct TrainedAttention {
  std::int64_t block_size = 0, top_k = 0, sink_blocks = 0, full_tail = 0;
  std::vector<LayerRange> full_layers;
  /// Those of each layer, where config.json has lists; the first three are then the first layer's.
  std::vector<Routing> layers{};
};

/// The shape of a Llama-family model, from any file format.
struct ModelConfig {
  std::string architecture;  // "llama", "mistral", "qwen2", "qwen3"
  std::int64_t layers = 0, hidden = 0, intermediate = 0, heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t vocab = 0, context = 0;
  double norm_eps = 1e-5;
  double rope_theta = 10000;
  RopeScaling rope;
  /// GGUF's `rope_freqs.weight`: each frequency is divided by its entry. Empty in Hugging Face folders.
  std::vector<float> rope_divisors;
  bool qkv_bias = false, output_bias = false, mlp_bias = false, qk_norm = false, tied_embeddings = false;
  std::optional<TrainedAttention> moba;
};

}  // namespace moba::llm
