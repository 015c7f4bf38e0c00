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

/// Low-rank adapters (arXiv 2106.09685): W + alpha / rank * B A in place of W, of which only A [rank, inputs]
/// and B [outputs, rank] are trained.
struct LoraSettings {
  std::int64_t rank = 8;
  double alpha = 16;
  /// Linear layers with adapters, by the last part of their name ("q_proj").
  std::vector<std::string> targets{"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                   "gate_proj", "up_proj", "down_proj"};

  double scale() const { return alpha / static_cast<double>(rank); }
};

struct ModelSettings {
  /// The dtype of matrix products and attention, f32 or bf16. Parameters and gradients are f32.
  DType dtype = DType::f32;
  /// Keeps only the input of each layer for the backward pass, which computes the rest again.
  bool recompute = false;
  int threads = 1;
  /// Maximum of tokens in a batch; memory is allocated for them once.
  std::int64_t max_tokens = 0;
  std::optional<LoraSettings> lora;
};

/// Returns approximately the bytes that training a model of this shape takes: parameters with their gradients
/// and means, and activations.
double bytes_needed(const ModelConfig& config, const ModelSettings& settings);

/// Named tensors with their values and gradients.
struct Parameters {
  const Layout* layout;
  std::span<float> values, gradients;
};

/// A trainable Llama-family decoder: one forward and backward pass over a batch, written out layer by layer.
/// Tensors have the names and shapes of the model that llm/model runs.
class Model {
 public:
  Model(const ModelConfig& config, const ModelSettings& settings);

  /// Draws matrices from a normal distribution, sets norms to 1 and biases to 0, as transformers initialises.
  void initialise(double deviation, std::uint64_t seed);
  void load(const Weights& weights);
  /// Draws the adapters' A and sets their B to 0.
  void initialise_adapters(std::uint64_t seed);

  const ModelConfig& config() const;
  const Layout& layout() const;
  /// Returns every weight for saving, with the adapters merged.
  std::vector<float> merged() const;
  /// Returns the trained parameters: every weight, or the adapters.
  Parameters trained();
  /// Updates the working copies; call it after the trained values have changed.
  void values_changed();

  /// Adds `scale` * the gradient of the sum of the batch's losses to the gradients. Layer l attends with
  /// `routings[l]`. Returns the loss of every token, 0 where its target is -1.
  std::vector<float> forward_backward(const Batch& batch, std::span<const Routing> routings, float scale);

  /// Returns the first part of the forward pass of `batch` with a value that is not finite ("the output of
  /// layer 3's MLP"), or "".
  std::string first_non_finite(const Batch& batch, std::span<const Routing> routings);

  /// Returns the seconds spent in attention so far, forward and backward.
  double attention_seconds() const;

  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moba::llm::train
