#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "llm/config.h"
#include "llm/formats/weights.h"
#include "llm/train/batch.h"
#include "llm/train/layout.h"
#include "moba/attention.h"
#include "moba/tensor.h"

namespace moba::llm::train {

/// Low-rank adapters (arXiv 2106.09685): W + alpha / rank * B A in place of W, of which A [rank, inputs] and
/// B [outputs, rank] alone are trained.
struct LoraSettings {
  std::int64_t rank = 8;
  double alpha = 16;
  /// Linear layers that get one, by the last part of their name ("q_proj").
  std::vector<std::string> targets{"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                   "gate_proj", "up_proj", "down_proj"};

  double scale() const { return alpha / static_cast<double>(rank); }
};

struct ModelSettings {
  /// The dtype of matrix products and attention, f32 or bf16. Parameters and gradients are f32.
  DType dtype = DType::f32;
  /// Keep only the input of each layer for the backward pass, which computes the rest again.
  bool recompute = false;
  int threads = 1;
  /// Most tokens of a batch; memory is taken for them once.
  std::int64_t max_tokens = 0;
  std::optional<LoraSettings> lora;
};

/// Bytes that training a model of this shape takes, about: parameters with their gradients and means, and
/// activations.
double bytes_needed(const ModelConfig& config, const ModelSettings& settings);

/// Named tensors and what is known of each number in them.
struct Parameters {
  const Layout* layout;
  std::span<float> values, gradients;
};

/// A Llama-family decoder that learns: one forward and backward pass over a batch, written out layer by
/// layer. Tensors have the names and shapes of the model that llm/model runs.
class Model {
 public:
  Model(const ModelConfig& config, const ModelSettings& settings);

  /// Matrices drawn from a normal distribution, norms 1, biases 0: `transformers`' way to begin.
  void initialise(double deviation, std::uint64_t seed);
  void load(const Weights& weights);
  /// Draws the adapters' A; their B begin at 0.
  void initialise_adapters(std::uint64_t seed);

  const ModelConfig& config() const;
  const Layout& layout() const;
  /// Every weight, adapters merged: as the model is to be saved.
  std::vector<float> merged() const;
  /// The trained parameters: every weight, or the adapters.
  Parameters trained();
  /// To be called after the trained values have changed, before the next pass.
  void values_changed();

  /// Adds `scale` * the gradient of the sum of the batch's losses to the gradients. Layer l attends as
  /// `routings[l]` says. Returns the loss of every token, 0 where its target is -1.
  std::vector<float> forward_backward(const Batch& batch, std::span<const Routing> routings, float scale);

  /// Finds the place in the forward pass of `batch` where a number that is not finite turns up first ("the
  /// output of layer 3's MLP"); empty where all are.
  std::string first_non_finite(const Batch& batch, std::span<const Routing> routings);

  /// Spent inside attention so far, forward and backward.
  double attention_seconds() const;

  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moba::llm::train
