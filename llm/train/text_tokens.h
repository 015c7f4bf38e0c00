#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace moba::llm::train {

/// Turns texts into the tokens to train on: a tokenizer's files, or the bytes themselves.
class TextTokens {
 public:
  /// Token i is byte i; token 256 ends a document.
  static TextTokens bytes();
  /// From a Hugging Face folder or a GGUF file. Throws DataError.
  static TextTokens open(const std::filesystem::path& model);

  /// The tokens of a text, after what the tokenizer puts before every text (a BOS token, say) where it is the
  /// `beginning` of a document. Special tokens that the text spells out stay text.
  std::vector<std::int32_t> encode(std::string_view text, bool beginning) const;
  /// The token that ends a document; -1 where the tokenizer has none.
  std::int32_t end() const;
  std::int64_t vocab_size() const;
  /// Tells one tokenizer from another.
  const std::string& identity() const;
  /// Writes the files that make `transformers` and llm/tokenizer read texts in the same way.
  void save(const std::filesystem::path& folder) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm::train
