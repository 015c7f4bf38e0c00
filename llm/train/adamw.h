#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "llm/train/model.h"

namespace moba::llm::train {

/// AdamW (arXiv 1711.05101) as PyTorch computes it; weight decay on matrices alone.
class AdamW {
 public:
  struct Settings {
    double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
  };

  AdamW(const Parameters& parameters, const Settings& settings);

  /// Takes step number `step`, counted from 1.
  void update(std::int64_t step, double learning_rate);

  /// Return the running means of the gradient and of its square.
  std::span<float> means() { return means_; }
  std::span<float> squares() { return squares_; }

 private:
  Parameters parameters_;
  Settings settings_;
  std::vector<float> means_, squares_;
};

/// Returns the Euclidean norm of all gradients, after scaling them down to `max_norm` if it is larger. 0: no
/// limit.
double clip(const Parameters& parameters, double max_norm);

void clear_gradients(const Parameters& parameters);

}  // namespace moba::llm::train
