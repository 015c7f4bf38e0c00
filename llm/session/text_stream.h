#pragma once

#include <string>
#include <string_view>

namespace moba::llm {

/// Turns the bytes of tokens, which may end inside a character, into complete UTF-8. Invalid bytes become
/// U+FFFD.
class TextStream {
 public:
  /// Adds bytes; returns the characters that are complete.
  std::string push(std::string_view bytes);
  /// Returns the remaining text at the end, its unfinished character replaced.
  std::string finish();

 private:
  std::string pending_;
};

}  // namespace moba::llm
