#pragma once

#include <filesystem>
#include <string>

#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// Temporary folder, removed by the destructor.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Writes a file and returns its path.
  std::filesystem::path write(const std::string& name, const std::string& text) const;

 private:
  std::filesystem::path path_;
};

/// Returns a tokenizer whose token i is byte i.
const Tokenizer& byte_tokenizer();

/// Returns numbered lines of made-up words, all different.
std::string lines_of_text(int lines);

std::size_t count_of(const std::string& text, const std::string& part);

}  // namespace moba::llm::eval
