#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "llm/model/model.h"
#include "moba/attention.h"

namespace moba::llm {

struct SensitivitySettings {
  std::vector<Routing> candidates;
  /// The candidate whose effect on the model's predictions is measured in every layer.
  std::size_t probe = 0;
  /// The last tokens of the sequence: those that are measured, and attend sparsely.
  std::int64_t tail = 1024;
  int threads = 1;
};

/// Returns [layers][candidates]: the mean Kullback-Leibler divergence of the next-token distributions, in
/// nats, that a candidate causes in one layer while all others attend fully.
///
/// The probe's is measured: its layer attends sparsely to the tail, and what follows is computed again. The
/// others are scaled from it by the squared errors that they cause in what the layer's attention adds to the
/// residual stream, which takes no further passes. Keys and values of the tokens before the tail stay those
/// of full attention. Progress is a share from 0 to 1.
std::vector<std::vector<double>> sensitivities(const Model& model, std::span<const std::int32_t> tokens,
                                               const SensitivitySettings& settings,
                                               const std::function<void(double)>& progress);

}  // namespace moba::llm
