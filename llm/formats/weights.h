#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llm/config.h"
#include "llm/formats/tensor.h"

namespace moba::llm {

struct WeightFile {
  std::string name;
  std::uint64_t bytes;
};

/// The weights of one model, memory-mapped: a Hugging Face folder or a GGUF file. Opening reads headers only.
class Weights {
 public:
  /// Throws DataError, also where a tensor that the configuration calls for is missing or has another shape.
  static Weights open(const std::filesystem::path& path);

  const ModelConfig& config() const;
  /// The files that hold the tensors.
  const std::vector<WeightFile>& files() const;
  /// Every tensor under the name that its file gives it, in file order.
  const std::vector<StoredTensor>& tensors() const;
  /// The tensor that plays the part of this Hugging Face name ("model.layers.0.self_attn.q_proj.weight"), or
  /// null. GGUF's own names are translated.
  const StoredTensor* find(std::string_view hugging_face_name) const;
  /// Row `row` of the Hugging Face tensor lies at this row of the stored one. GGUF's Llama files interleave
  /// the rotary halves of q and k; everywhere else this is the identity.
  std::int64_t stored_row(std::string_view hugging_face_name, std::int64_t row) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm
