#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "llm/config.h"
#include "llm/formats/weights.h"
#include "llm/model/arithmetic.h"
#include "moba/tensor.h"

namespace moba::llm {

/// Attends one layer and extends its KV cache: `k` and `v` [n, Hkv, D] of n new tokens, `q` and `out` [m, Hq,
/// D] of the last m <= n of them (m = 0 where no output is needed), in f32 or the model's dtype. Rotary
/// positions are already applied. An exception of the callee ends the forward pass.
using AttentionFn = std::function<void(std::int64_t layer, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& out)>;

/// The tokens of a forward pass whose logits are returned.
enum class Logits : std::uint8_t { none, last, all };

/// The weights of a Llama-family decoder, and its forward pass. Independent of caches,
/// routings and chunks.
class Model {
 public:
  /// Keeps the weights mapped, as the files have them.
  static Model load(const Weights& weights, const Arithmetic& arithmetic);

  const ModelConfig& config() const;
  DType dtype() const;

  /// Reads `tokens`, the first of them at position `first`. Returns logits [rows, vocab], where rows is 0, 1
  /// or tokens.size() according to `logits`. Throws DataError for an id outside the vocabulary.
  std::vector<float> forward(std::span<const std::int32_t> tokens, std::int64_t first,
                             const AttentionFn& attend, Logits logits) const;
  // The parts of a forward pass, for those who look into it. The residual stream is [tokens, hidden].

  /// Returns the residual stream before the first layer.
  std::vector<float> embed(std::span<const std::int32_t> tokens) const;
  /// Passes the residual stream of tokens from position `first` on through layers [begin, end), in place.
  void run_layers(std::span<float> residual, std::int64_t first, std::int64_t begin, std::int64_t end,
                  const AttentionFn& attend) const;
  /// Returns the product of attention outputs [n, Hq * D] with the output matrix of a layer, [n, hidden]:
  /// what the layer's attention adds to the residual stream.
  std::vector<float> attention_output(std::int64_t layer, std::span<const float> attended) const;
  /// Returns the logits [tokens, vocab] of the residual stream after the last layer.
  std::vector<float> logits(std::span<const float> residual) const;

  /// Reads one token of each of several sequences, at `positions`. Returns logits [tokens, vocab], in each
  /// row the bits that forward() gives for the token alone.
  std::vector<float> decode(std::span<const std::int32_t> tokens, std::span<const std::int64_t> positions,
                            const AttentionFn& attend) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

/// Sets the number of threads of every Model of this process, at least 1.
void use_threads(int threads);

}  // namespace moba::llm
