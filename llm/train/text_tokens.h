#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::train {

/// Encodes texts for training, with a tokenizer or as bytes.
class TextTokens {
 public:
  /// Token i is byte i; token 256 ends a document.
  static TextTokens bytes();
  /// Opens the tokenizer of a Hugging Face folder or a GGUF file. Throws DataError.
  static TextTokens open(const std::filesystem::path& model);

  /// Returns the tokens of a text, at the `beginning` of a document after the tokenizer's special tokens
  /// (such as BOS). Special tokens spelled out in the text stay text.
  std::vector<std::int32_t> encode(std::string_view text, bool beginning) const;
  /// Returns the tokens of a conversation in the form of the tokenizer's chat template. Throws UsageError for
  /// bytes, a tokenizer without a supported template, and turns that the template does not take.
  ChatTokens encode_chat(const std::vector<Turn>& turns) const;
  /// Returns the token that ends a document, or -1.
  std::int32_t end() const;
  std::int64_t vocab_size() const;
  /// Returns a fingerprint of the tokenizer.
  const std::string& identity() const;
  /// Writes the files from which `transformers` and llm/tokenizer load this tokenizer.
  void save(const std::filesystem::path& folder) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm::train
