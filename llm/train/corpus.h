#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llm/train/text_tokens.h"

namespace moba::llm::train {

/// Texts as tokens, memory-mapped, a document after the other. A text file is a document; a file that ends in
/// .jsonl has one in each line, {"text": ...} or {"prompt": ..., "completion": ...}. The end-of-text token
/// closes every document.
class Corpus {
 public:
  struct Document {
    std::size_t shard;
    std::int64_t begin, count;  // tokens
    std::int64_t prompt;        // how many of them are the prompt
  };
  /// Told what is left out of a folder, and how far tokenising has got.
  using Log = std::function<void(const std::string&)>;

  /// Tokens of `paths`, files or folders with their subfolders, kept in `cache`: made there if it holds none,
  /// or those of other files, other contents or another tokenizer. Of a folder, files that are hidden, empty
  /// or binary are left out, and the folder that `cache` is in; given by name, they are a DataError.
  static Corpus open(const std::vector<std::filesystem::path>& paths, const TextTokens& tokens,
                     const std::filesystem::path& cache, const Log& log);

  const std::vector<Document>& documents() const;
  std::int64_t tokens() const;
  /// Tells the contents from any other.
  const std::string& fingerprint() const;
  /// Tokens [first, first + count) of a document.
  void read(const Document& document, std::int64_t first, std::int64_t count, std::int32_t* out) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm::train
