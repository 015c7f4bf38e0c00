#include "texts.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "llm/eval/random.h"
#include "llm/train/text_tokens.h"

namespace moba::llm::eval {

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "moba-eval-XXXXXX").string();
  path_ = mkdtemp(name.data());
}

TemporaryFolder::~TemporaryFolder() {
  std::filesystem::remove_all(path_);
}

std::filesystem::path TemporaryFolder::write(const std::string& name, const std::string& text) const {
  std::filesystem::path path = path_ / name;
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

const Tokenizer& byte_tokenizer() {
  static const Tokenizer tokenizer = [] {
    const TemporaryFolder folder;
    train::TextTokens::bytes().save(folder.path());
    return Tokenizer::open(folder.path());
  }();
  return tokenizer;
}

std::string lines_of_text(int lines) {
  Random random{7};
  std::string text;
  for (int line = 0; line < lines; ++line) {
    text += "line";
    for (int word = 0; word < 8; ++word) {
      text += ' ';
      for (int letter = 0; letter < 6; ++letter) text += static_cast<char>('a' + random.below(26));
    }
    text += ".\n";
  }
  return text;
}

std::size_t count_of(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++count;
  return count;
}

}  // namespace moba::llm::eval
