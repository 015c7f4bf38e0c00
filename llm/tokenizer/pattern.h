#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// Returns a text of the same length as `text` in which PCRE2's classes `\p{L}`, `\p{N}` and `\s` match as in
/// the Hugging Face tokenizers (Unicode 16): characters newer than PCRE2's Unicode are replaced by older ones
/// of the same class, and every byte that is not UTF-8 by a control character.
std::string class_stand_in(std::string_view text);

/// A regular expression of a pre-tokenizer, in the dialect that Oniguruma (Ruby) and PCRE2 share.
class Pattern {
 public:
  /// `origin` names the file and the place in it, for errors. Throws DataError for an invalid expression.
  static Pattern regex(const std::string& expression, std::string origin);
  /// Matches `text` itself.
  static Pattern literal(const std::string& text, std::string origin);

  /// Returns the matches in `subject`, a class_stand_in(), from left to right. Throws DataError if the
  /// expression takes more than 10 million steps, and 16 for each byte.
  std::vector<Span> find_all(std::string_view subject) const;

 private:
  Pattern(const std::string& expression, bool literal, std::string origin);

  std::string origin_;
  std::string expression_;
  std::shared_ptr<const void> code_;
};

}  // namespace moba::llm
