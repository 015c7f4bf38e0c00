#include "llm/calibrate/sensitivity.h"

#include <algorithm>
#include <cstring>

#include "llm/eval/loss.h"
#include "src/number.h"

namespace moba::llm {
namespace {

/// A tensor [tokens, heads, D] in memory of its own.
class OwnTensor {
 public:
  OwnTensor(std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, DType dtype)
      : bytes_(static_cast<std::size_t>(tokens * heads * head_dim) * size_of(dtype)),
        view_{.data = bytes_.data(),
              .dtype = dtype,
              .rank = 3,
              .sizes = {tokens, heads, head_dim},
              .strides = {heads * head_dim, head_dim, 1}} {}
  OwnTensor(OwnTensor&&) = default;

  const Tensor& view() const { return view_; }

  /// Copies `rows` to the tokens from `first` on.
  void store(const Tensor& rows, std::int64_t first) {
    const std::size_t size = size_of(view_.dtype);
    const std::size_t row_bytes = static_cast<std::size_t>(view_.strides[0]) * size;
    for (std::int64_t i = 0; i < rows.sizes[0]; ++i) {
      std::memcpy(
          bytes_.data() + static_cast<std::size_t>(first + i) * row_bytes,
          static_cast<const std::byte*>(rows.data) + static_cast<std::size_t>(i * rows.strides[0]) * size,
          row_bytes);
    }
  }
  std::vector<float> floats() const {
    std::vector<float> values(bytes_.size() / size_of(view_.dtype));
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>(load(view_.data, view_.dtype, static_cast<std::int64_t>(i)));
    return values;
  }

 private:
  std::vector<std::byte> bytes_;
  Tensor view_;
};

/// One sequence under full attention, and what changes where one layer attends sparsely to its tail.
class Sequence {
 public:
  Sequence(const Model& model, std::span<const std::int32_t> tokens, const SensitivitySettings& settings)
      : model_(model),
        settings_(settings),
        config_(model.config()),
        tokens_(static_cast<std::int64_t>(tokens.size())),
        tail_(std::min(settings.tail, tokens_)) {
    execution_.parallel = openmp(settings.threads);
    residual_ = model.embed(tokens);
  }

  /// Passes the whole sequence through the next layer.
  void advance() {
    const auto layer = static_cast<std::int64_t>(tails_.size());
    tails_.push_back(tail_of(residual_));
    model_.run_layers(
        residual_, 0, layer, layer + 1,
        [&](std::int64_t, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
          for (auto [list, rows] : {std::pair(&keys_, &k), std::pair(&values_, &v)}) {
            list->emplace_back(tokens_, config_.kv_heads, config_.head_dim, rows->dtype);
            list->back().store(*rows, 0);
          }
          attention(q, k, v, one_sequence(tokens_), Routing::full(), {.out = out}, execution_);
        });
  }

  /// Ends the passes of advance().
  void finish() { logits_ = model_.logits(tail_of(residual_)); }

  /// Returns the divergence where a layer attends to the tail by `routing`.
  double divergence(std::int64_t layer, const Routing& routing) {
    std::vector<float> residual = tails_[static_cast<std::size_t>(layer)];
    model_.run_layers(
        residual, tokens_ - tail_, layer, config_.layers,
        [&](std::int64_t l, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
          store(l, k, v);
          attend(l, q, l == layer ? routing : Routing::full(), out);
        });
    const std::vector<float> logits = model_.logits(residual);
    const auto vocab = static_cast<std::size_t>(config_.vocab);
    std::vector<double> of_tokens(static_cast<std::size_t>(tail_));
    execution_.parallel.run(tail_, [&](std::int64_t token, int) {
      const auto row = static_cast<std::size_t>(token);
      const auto row_of = [&](const std::vector<float>& all) {
        return std::span<const float>(all).subspan(row * vocab, vocab);
      };
      of_tokens[row] = eval::divergence(row_of(logits_), row_of(logits));
    });
    double sum = 0;
    for (const double of_token : of_tokens) sum += of_token;
    return sum / static_cast<double>(tail_);
  }

  /// Returns the squared error of each candidate in what a layer's attention adds to the residual stream.
  std::vector<double> errors(std::int64_t layer) {
    std::vector<double> errors;
    std::vector<float> residual = tails_[static_cast<std::size_t>(layer)];
    model_.run_layers(
        residual, tokens_ - tail_, layer, layer + 1,
        [&](std::int64_t l, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
          store(l, k, v);
          const std::vector<float> exact = attended(l, q, Routing::full());
          for (const Routing& routing : settings_.candidates) {
            std::vector<float> difference = attended(l, q, routing);
            for (std::size_t i = 0; i < exact.size(); ++i) difference[i] -= exact[i];
            double error = 0;
            for (const float value : model_.attention_output(l, difference))
              error += static_cast<double>(value) * static_cast<double>(value);
            errors.push_back(error);
          }
          attend(l, q, Routing::full(), out);
        });
    return errors;
  }

 private:
  std::vector<float> tail_of(const std::vector<float>& residual) const {
    return {residual.end() - tail_ * config_.hidden, residual.end()};
  }
  void store(std::int64_t layer, const Tensor& k, const Tensor& v) {
    keys_[static_cast<std::size_t>(layer)].store(k, tokens_ - tail_);
    values_[static_cast<std::size_t>(layer)].store(v, tokens_ - tail_);
  }
  void attend(std::int64_t layer, const Tensor& q, const Routing& routing, const Tensor& out) const {
    attention(q, keys_[static_cast<std::size_t>(layer)].view(),
              values_[static_cast<std::size_t>(layer)].view(), one_sequence(tail_, tokens_), routing,
              {.out = out}, execution_);
  }
  std::vector<float> attended(std::int64_t layer, const Tensor& q, const Routing& routing) const {
    const OwnTensor out(tail_, config_.heads, config_.head_dim, q.dtype);
    attend(layer, q, routing, out.view());
    return out.floats();
  }

  const Model& model_;
  const SensitivitySettings& settings_;
  const ModelConfig& config_;
  std::int64_t tokens_, tail_;
  Execution execution_;
  std::vector<float> residual_;            // of all tokens, before the next layer
  std::vector<std::vector<float>> tails_;  // by layer: of the tail, before it
  std::vector<OwnTensor> keys_, values_;   // by layer
  std::vector<float> logits_;              // of the tail
};

}  // namespace

std::vector<std::vector<double>> sensitivities(const Model& model, std::span<const std::int32_t> tokens,
                                               const SensitivitySettings& settings,
                                               const std::function<void(double)>& progress) {
  const std::int64_t layers = model.config().layers;
  // A layer of the whole sequence takes about as long as a probe, which computes an eighth of the tokens in
  // half of the layers.
  const double total = 2 * static_cast<double>(layers);
  Sequence sequence(model, tokens, settings);
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    progress(static_cast<double>(layer) / total);
    sequence.advance();
  }
  sequence.finish();
  std::vector<std::vector<double>> result;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    progress(static_cast<double>(layers + layer) / total);
    const double measured = sequence.divergence(layer, settings.candidates[settings.probe]);
    std::vector<double>& of_layer = result.emplace_back(sequence.errors(layer));
    const double error = of_layer[settings.probe];
    for (double& candidate : of_layer) candidate = error > 0 ? measured * candidate / error : 0;
  }
  return result;
}

}  // namespace moba::llm
