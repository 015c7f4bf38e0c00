#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "llm/eval/random.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// Real text to hide things in.
class Haystack {
 public:
  /// The text of files and folders, the files shuffled by `seed`, the first 64 MiB of it. With no paths, the
  /// Python standard library's sources as they are installed on this machine. Throws DataError.
  static Haystack open(std::vector<std::filesystem::path> paths, std::int64_t seed);

  /// The source of the text, in words.
  const std::string& source() const { return source_; }
  /// At least this many tokens of consecutive lines, from a random one on. Throws DataError where the text is
  /// too short.
  std::vector<std::int32_t> take(const Tokenizer& tokenizer, std::int64_t tokens, Random& random) const;
  /// Its different words of 4 to 12 small letters of English, in alphabetical order.
  std::vector<std::string> words() const;

 private:
  std::string text_, source_;
};

}  // namespace moba::llm::eval
