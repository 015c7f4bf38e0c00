#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace moba::llm {

/// How positions beyond the trained context are squeezed (`rope_scaling` / `rope_parameters` in config.json,
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

/// The shape of a Llama-family model, whatever file it came from.
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
};

/// Layers [first, last], counted from 0.
struct LayerRange {
  std::int64_t first, last;
};

}  // namespace moba::llm
