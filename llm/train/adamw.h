#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "llm/train/model.h"

namespace moba::llm::train {

/// AdamW (arXiv 1711.05101) as PyTorch's computes it; weight decay on matrices alone.
class AdamW {
 public:
  struct Settings {
    double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
  };

  AdamW(const Parameters& parameters, const Settings& settings);

  /// Step number `step`, counted from 1.
  void update(std::int64_t step, double learning_rate);

  /// Running means of the gradient and of its square.
  std::span<float> means() { return means_; }
  std::span<float> squares() { return squares_; }

 private:
  Parameters parameters_;
  Settings settings_;
  std::vector<float> means_, squares_;
};

/// Euclidean norm of all gradients; where it is above `max_norm`, they are scaled down to that. 0: any norm
/// goes.
double clip(const Parameters& parameters, double max_norm);

void clear_gradients(const Parameters& parameters);

}  // namespace moba::llm::train
