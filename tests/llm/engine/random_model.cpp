#include "random_model.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "llm/formats/layer.h"
#include "llm/formats/weights.h"
#include "llm/formats/write_config.h"
#include "llm/formats/write_safetensors.h"

namespace moba::llm::test {
namespace fs = std::filesystem;
namespace {

class RandomTensors {
 public:
  explicit RandomTensors(unsigned seed) : random_(seed) {}

  void add(const std::string& name, const std::vector<std::int64_t>& shape, bool is_norm) {
    std::int64_t size = 1;
    for (const std::int64_t n : shape) size *= n;
    std::vector<float>& values = values_.emplace_back();
    std::normal_distribution<float> normal;
    // Attention and logits far from uniform, so that rounding does not change the likeliest token.
    const float scale = is_norm ? 0.1F : 1.5F / std::sqrt(static_cast<float>(shape.back()));
    for (std::int64_t i = 0; i < size; ++i)
      values.push_back((is_norm ? 1.0F : 0.0F) + scale * normal(random_));
    tensors_.push_back({name, shape, {}});
  }
  std::vector<NamedTensor> take() {
    for (std::size_t i = 0; i < tensors_.size(); ++i) tensors_[i].values = values_[i];
    return tensors_;
  }

 private:
  std::mt19937_64 random_;
  std::vector<std::vector<float>> values_;
  std::vector<NamedTensor> tensors_;
};

}  // namespace

ModelConfig small_config() {
  ModelConfig config;
  config.architecture = "llama";
  config.layers = 3;
  config.hidden = 64;
  config.intermediate = 96;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 16;
  config.vocab = 320;
  config.context = 1024;
  config.tied_embeddings = true;
  return config;
}

Weights random_weights(const ModelConfig& config, unsigned seed) {
  RandomTensors tensors(seed);
  tensors.add(std::string(kEmbeddingName) + ".weight", {config.vocab, config.hidden}, false);
  const LayerShape layer = layer_shape(config);
  for (std::int64_t i = 0; i < config.layers; ++i) {
    for (const NormShape& norm : {layer.attention_norm, layer.mlp_norm})
      tensors.add(layer_prefix(i) + norm.name + ".weight", {norm.size}, true);
    for (const LinearShape& linear : linears_of(config))
      tensors.add(layer_prefix(i) + linear.name + ".weight", {linear.outputs, linear.inputs}, false);
  }
  tensors.add(std::string(kFinalNormName) + ".weight", {config.hidden}, true);

  const fs::path folder = fs::temp_directory_path() / ("moba-engine-test-" + std::to_string(getpid()));
  fs::create_directories(folder);
  std::ofstream(folder / "config.json") << config_json(config).dump();
  write_safetensors(folder / "model.safetensors", tensors.take());
  Weights weights = Weights::open(folder);
  fs::remove_all(folder);  // the mapping stays
  return weights;
}

Model random_model(const ModelConfig& config) {
  return Model::load(random_weights(config), {.dtype = DType::f32, .int8_decode = false});
}

}  // namespace moba::llm::test
