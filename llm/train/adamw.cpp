#include "llm/train/adamw.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <cmath>

namespace moba::llm::train {
namespace {

at::Tensor tensor_of(std::span<float> values) {
  return at::from_blob(values.data(), {static_cast<std::int64_t>(values.size())}, at::kFloat);
}

}  // namespace

AdamW::AdamW(const Parameters& parameters, const Settings& settings)
    : parameters_(parameters),
      settings_(settings),
      means_(parameters.values.size()),
      squares_(parameters.values.size()) {}

void AdamW::update(std::int64_t step, double learning_rate) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const auto matrices = static_cast<std::size_t>(parameters_.layout->matrices());
  const auto update_part = [&](std::size_t first, std::size_t count, double decay) {
    if (count == 0) return;
    const auto part = [&](std::span<float> all) { return tensor_of(all.subspan(first, count)); };
    at::_fused_adamw_({part(parameters_.values)}, {part(parameters_.gradients)}, {part(means_)},
                      {part(squares_)}, {}, {at::full({}, static_cast<double>(step), at::kFloat)},
                      learning_rate, settings_.beta1, settings_.beta2, decay, settings_.epsilon,
                      /*amsgrad=*/false, /*maximize=*/false);
  };
  update_part(0, matrices, settings_.weight_decay);
  update_part(matrices, parameters_.values.size() - matrices, 0);
}

double clip(const Parameters& parameters, double max_norm) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  at::Tensor gradients = tensor_of(parameters.gradients);
  const double norm = at::linalg_vector_norm(gradients, 2).item<double>();
  if (max_norm > 0 && norm > max_norm) gradients.mul_(max_norm / (norm + 1e-6));  // PyTorch's guard
  return norm;
}

void clear_gradients(const Parameters& parameters) {
  tensor_of(parameters.gradients).zero_();
}

}  // namespace moba::llm::train
