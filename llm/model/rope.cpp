#include "llm/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

namespace moba::llm {
namespace {

/// Llama 3: divides low frequencies by `factor`, keeps high ones and interpolates between them.
double llama3_frequency(double frequency, const RopeScaling& scaling) {
  const double turns = static_cast<double>(scaling.original_context) * frequency / (2 * std::numbers::pi);
  if (turns < scaling.low_freq_factor) return frequency / scaling.factor;
  if (turns > scaling.high_freq_factor) return frequency;
  const double blend =
      (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1 - blend) * frequency / scaling.factor + blend * frequency;
}

/// YaRN's ramp: dimensions below `low` keep their frequency, those above `high` have it divided.
struct Ramp {
  double low, high;

  double stretched(std::int64_t i) const {
    return std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  }
};

Ramp yarn_ramp(const ModelConfig& config) {
  const RopeScaling& scaling = config.rope;
  const double dim = static_cast<double>(config.head_dim);
  const auto dimension_of = [&](double rotations) {
    const double context = static_cast<double>(scaling.original_context);
    return dim * std::log(context / (rotations * 2 * std::numbers::pi)) / (2 * std::log(config.rope_theta));
  };
  double low = dimension_of(scaling.beta_fast), high = dimension_of(scaling.beta_slow);
  if (scaling.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;  // avoids a division by zero
  return {low, high};
}

double yarn_magnitude(const RopeScaling& scaling) {
  if (scaling.attention_factor) return *scaling.attention_factor;
  const auto magnitude = [&](double m) {
    return scaling.factor <= 1 ? 1.0 : 0.1 * m * std::log(scaling.factor) + 1.0;
  };
  const double numerator = scaling.mscale.value_or(0), denominator = scaling.mscale_all_dim.value_or(0);
  if (numerator != 0 && denominator != 0) return magnitude(numerator) / magnitude(denominator);
  return magnitude(1);
}

}  // namespace

Rope make_rope(const ModelConfig& config) {
  using Kind = RopeScaling::Kind;
  const RopeScaling& scaling = config.rope;
  const Ramp ramp = scaling.kind == Kind::yarn ? yarn_ramp(config) : Ramp{0, 1};
  Rope rope;
  if (scaling.kind == Kind::yarn) rope.magnitude = yarn_magnitude(scaling);
  for (std::int64_t i = 0; i < config.head_dim / 2; ++i) {
    double frequency =
        std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    if (!config.rope_divisors.empty()) frequency /= config.rope_divisors[static_cast<std::size_t>(i)];
    switch (scaling.kind) {
      case Kind::none:
        break;
      case Kind::linear:
        frequency /= scaling.factor;
        break;
      case Kind::llama3:
        frequency = llama3_frequency(frequency, scaling);
        break;
      case Kind::yarn:
        frequency *= 1 - ramp.stretched(i) * (1 - 1 / scaling.factor);
        break;
    }
    rope.frequencies.push_back(static_cast<float>(frequency));
  }
  return rope;
}

std::vector<float> rope_rows(const Rope& rope, std::int64_t first, std::int64_t count) {
  std::vector<std::int64_t> positions(static_cast<std::size_t>(count));
  std::iota(positions.begin(), positions.end(), first);
  return rope_rows(rope, positions);
}

std::vector<float> rope_rows(const Rope& rope, std::span<const std::int64_t> positions) {
  const std::size_t half = rope.frequencies.size();
  std::vector<float> rows(positions.size() * 2 * half);
  for (std::size_t t = 0; t < positions.size(); ++t) {
    float* row = rows.data() + t * 2 * half;
    for (std::size_t i = 0; i < half; ++i) {
      // A product in f32, as in training.
      const float angle = static_cast<float>(positions[t]) * rope.frequencies[i];
      row[i] = static_cast<float>(std::cos(static_cast<double>(angle)) * rope.magnitude);
      row[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)) * rope.magnitude);
    }
  }
  return rows;
}

}  // namespace moba::llm
