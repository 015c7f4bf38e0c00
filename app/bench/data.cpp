#include "app/bench/data.h"

#include <algorithm>
#include <vector>

#include "app/bench/memory.h"

namespace moba::bench {
namespace {

constexpr std::int64_t kTokensPerTask = 512;
/// The clustered pattern: text comes in stretches, each about one of a few subjects.
constexpr std::int64_t kStretch = 1024, kSubjects = 16;
constexpr float kClusteredQueryNoise = 0.25F;

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
std::uint64_t mix(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

/// Four uniform numbers added: close to Gaussian, and quick.
float noise(std::uint64_t stream, std::uint64_t index) {
  const std::uint64_t bits = mix(stream + index * 0x9E3779B97F4A7C15);
  const std::uint64_t sum =
      (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + (bits >> 48);
  constexpr float kMean = 2 * 65535.0F, kDeviation = 37837.2F;  // 65536 sqrt(4 / 12)
  return (static_cast<float>(sum) - kMean) / kDeviation;
}

/// The centres that one kv head's keys and queries may lie around, [centres][head_dim].
class Aims {
 public:
  Aims(Role role, const Recipe& recipe, std::int64_t kv_heads, std::int64_t head_dim)
      : role_(role), recipe_(recipe), head_dim_(head_dim) {
    const std::uint64_t stream = mix(recipe.seed ^ 0xC3);
    centres_.resize(static_cast<std::size_t>(kSubjects * kv_heads * head_dim));
    for (std::size_t i = 0; i < centres_.size(); ++i) centres_[i] = noise(stream, i);
  }

  /// Null: noise alone.
  const float* of(std::int64_t token, std::int64_t kv_head) const {
    if (role_ != Role::query && role_ != Role::key) return nullptr;
    switch (recipe_.pattern) {
      case Pattern::independent:
        return nullptr;
      case Pattern::clustered: {
        const auto stretch = static_cast<std::uint64_t>(token / kStretch);
        return centre(kv_head, static_cast<std::int64_t>(mix(recipe_.seed ^ stretch) % kSubjects));
      }
      case Pattern::sink:
        return role_ == Role::query || token < recipe_.sink_tokens ? centre(kv_head, 0) : nullptr;
    }
    return nullptr;
  }

 private:
  const float* centre(std::int64_t kv_head, std::int64_t subject) const {
    return centres_.data() + (kv_head * kSubjects + subject) * head_dim_;
  }

  Role role_;
  const Recipe& recipe_;
  std::int64_t head_dim_;
  std::vector<float> centres_;
};

}  // namespace

void fill(const Tensor& tensor, Role role, const Recipe& recipe, std::int64_t first_token,
          const Parallel& parallel) {
  const std::int64_t tokens = tensor.sizes[0], heads = tensor.sizes[1], head_dim = tensor.sizes[2];
  const std::int64_t group = role == Role::query ? recipe.group : 1;
  const Aims aims(role, recipe, heads / group, head_dim);
  const std::uint64_t stream = mix(recipe.seed * 8 + static_cast<std::uint64_t>(role));
  const float spread =
      role == Role::query && recipe.pattern == Pattern::clustered ? kClusteredQueryNoise : 1.0F;

  parallel.run((tokens + kTokensPerTask - 1) / kTokensPerTask, [&](std::int64_t task, int) {
    const std::int64_t end = std::min(tokens, (task + 1) * kTokensPerTask);
    for (std::int64_t token = task * kTokensPerTask; token < end; ++token) {
      for (std::int64_t head = 0; head < heads; ++head) {
        const float* aim = aims.of(first_token + token, head / group);
        const auto place = static_cast<std::uint64_t>(((first_token + token) * heads + head) * head_dim);
        const std::int64_t row = (token * heads + head) * head_dim;
        for (std::int64_t d = 0; d < head_dim; ++d) {
          const float value = spread * noise(stream, place + static_cast<std::uint64_t>(d));
          set(tensor, row + d, aim == nullptr ? value : value + aim[d]);
        }
      }
    }
  });
}

}  // namespace moba::bench
