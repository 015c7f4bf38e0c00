#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llm/train/text_tokens.h"

namespace moba::llm::train {

/// Texts as tokens, memory-mapped, one document after the other. A text file is a document; a file that ends
/// in .jsonl has one in each line, {"text": ...} or {"prompt": ..., "completion": ...}. The end-of-text token
/// closes every document.
class Corpus {
 public:
  struct Document {
    std::size_t shard;
    std::int64_t begin, count;  // tokens
    std::int64_t prompt;        // tokens of the prompt among them
  };
  /// Receives the files of a folder that are left out, and the progress of tokenising.
  using Log = std::function<void(const std::string&)>;

  /// Opens the tokens of `paths`, files or folders with their subfolders, in `cache`, and tokenises again if
  /// it holds none or those of other files, contents or another tokenizer. Leaves out hidden, empty and
  /// binary files of a folder, and the folder of `cache`; throws DataError for such a file given by name.
  static Corpus open(const std::vector<std::filesystem::path>& paths, const TextTokens& tokens,
                     const std::filesystem::path& cache, const Log& log);

  const std::vector<Document>& documents() const;
  std::int64_t tokens() const;
  /// Returns a fingerprint of the contents.
  const std::string& fingerprint() const;
  /// Reads tokens [first, first + count) of a document.
  void read(const Document& document, std::int64_t first, std::int64_t count, std::int32_t* out) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace moba::llm::train
