#include "llm/engine/model_fingerprint.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>

#include "llm/engine/sha256.h"
#include "llm/formats/write_config.h"

namespace moba::llm {

namespace {

std::string fingerprint(const Weights& weights, const std::string& arithmetic) {
  constexpr std::size_t kSample = 4096;
  Sha256 hash;
  ModelConfig config = weights.config();
  hash.add(std::as_bytes(std::span(config.rope_divisors)));
  config.rope_divisors.clear();  // unknown to config_json()
  hash.add(config_json(config).dump());
  hash.add(arithmetic);
  for (const StoredTensor& tensor : weights.tensors()) {
    hash.add(fmt::format("\n{} {} {}:", tensor.name, static_cast<int>(tensor.storage), tensor.bytes.size()));
    for (const std::int64_t size : tensor.shape) hash.add(fmt::format(" {}", size));
    const std::size_t sample = std::min(kSample, tensor.bytes.size());
    hash.add(tensor.bytes.first(sample)).add(tensor.bytes.last(sample));
  }
  return hex(hash.finish());
}

}  // namespace

std::string weights_fingerprint(const Weights& weights) {
  return fingerprint(weights, "");
}

std::string model_fingerprint(const Weights& weights, const Arithmetic& arithmetic) {
  return fingerprint(weights, fmt::format("{} {}", name_of(arithmetic.dtype), arithmetic.int8_decode));
}

}  // namespace moba::llm
