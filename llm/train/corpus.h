#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "llm/train/text_tokens.h"

namespace moba::llm::train {

/// Texts as tokens, memory-mapped, one document after the other. A text file is a document; a file that ends
/// in .jsonl has one in each line: {"text": ...}, {"messages": ...} or {"prompt": ..., "completion": ...}.
/// The end-of-text token closes every document but conversations, which end as the chat template does.
class Corpus {
 public:
  struct Document {
    std::size_t shard;
    std::int64_t begin, count;            // tokens
    std::size_t completion, completions;  // the first of its ranges of completions, and their number
  };
  /// Receives the files of a folder that are left out, and the progress of tokenising.
  using Log = std::function<void(const std::string&)>;

  /// Opens the tokens of `paths`, files or folders with their subfolders, in `cache`, and tokenises again if
  /// it holds none or those of other files, contents or another tokenizer. Leaves out hidden, empty and
  /// binary files of a folder, and the folder of `cache`; throws DataError for such a file given by name, and
  /// with `completion_only` for a conversation without an assistant turn.
  static Corpus open(const std::vector<std::filesystem::path>& paths, const TextTokens& tokens,
                     const std::filesystem::path& cache, bool completion_only, const Log& log);

  const std::vector<Document>& documents() const;
  /// Returns the tokens of a document that the loss on completions counts, as ascending ranges within it: all
  /// of a text, the completion of a prompt, the assistant turns of a conversation.
  std::span<const TokenRange> completions(const Document& document) const;
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
