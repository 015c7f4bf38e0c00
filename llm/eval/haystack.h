#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "llm/eval/random.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// The text that needles are planted in.
class Haystack {
 public:
  /// Reads files and folders, the files shuffled by `seed`, up to 64 MiB. Without paths it reads code and
  /// prose, the sources of this machine's Python standard library and Debian's licences, which take() draws
  /// from in equal shares. Throws DataError.
  static Haystack open(std::vector<std::filesystem::path> paths, std::int64_t seed);

  /// Returns a description of the source of the text.
  const std::string& source() const { return source_; }
  /// Returns at least this many tokens of consecutive lines, from a random one on. Throws DataError if the
  /// text is too short.
  std::vector<std::int32_t> take(const Tokenizer& tokenizer, std::int64_t tokens, Random& random) const;
  /// Returns the distinct words of 4 to 12 letters a to z in the text, in alphabetical order.
  std::vector<std::string> words() const;

 private:
  std::vector<std::string> texts_;  // of the same share each
  std::string source_;
};

}  // namespace moba::llm::eval
