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
  /// Throws DataError, also for a tensor of the configuration that is missing or has another shape.
  static Weights open(const std::filesystem::path& path);

  const ModelConfig& config() const;
  /// Returns the files of the tensors.
  const std::vector<WeightFile>& files() const;
  /// Returns every tensor under its name in the file, in file order.
  const std::vector<StoredTensor>& tensors() const;
  /// Returns the tensor with this Hugging Face name ("model.layers.0.self_attn.q_proj.weight"), or null.
  /// GGUF's names are translated.
  const StoredTensor* find(std::string_view hugging_face_name) const;
  /// Returns the row of the stored tensor that holds row `row` of the Hugging Face tensor. GGUF's Llama files
  /// interleave the rotary halves of q and k; everywhere else this is the identity.
  std::int64_t stored_row(std::string_view hugging_face_name, std::int64_t row) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm
