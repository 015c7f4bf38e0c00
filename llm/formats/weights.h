#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llm/config.h"

namespace moba::llm {

/// How a tensor's numbers are stored on disk: the three float types, and GGUF's block formats.
enum class Storage : std::uint8_t {
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k
};

/// One tensor in a memory-mapped file: outermost dimension first, as PyTorch prints it.
struct StoredTensor {
  std::string name;
  Storage storage = Storage::f32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
};

std::string_view name_of(Storage storage);

/// Rows [first, first + count) of `tensor` (its last dimension is a row) as f32, into `count * shape.back()`
/// floats.
void dequantise(const StoredTensor& tensor, std::int64_t first, std::int64_t count, float* out);

/// The weights of one model, memory-mapped: a Hugging Face folder or a GGUF file. Opening reads headers only.
class Weights {
 public:
  /// Throws DataError.
  static Weights open(const std::filesystem::path& path);

  const ModelConfig& config() const;
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
