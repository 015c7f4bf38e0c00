#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// A text of the same length as `text` in which PCRE2's classes `\p{L}`, `\p{N}` and `\s` mean what they mean
/// to the Hugging Face tokenizers (Unicode 16): characters that PCRE2 is too old to know are replaced by
/// known ones of the same class, and every byte that is not UTF-8 by a control character.
std::string class_stand_in(std::string_view text);

/// A regular expression of a pre-tokenizer, in the dialect that Oniguruma (Ruby) and PCRE2 share.
class Pattern {
 public:
  /// `origin` names the file and the place in it, for errors. Throws DataError for what is not a pattern.
  static Pattern regex(const std::string& expression, std::string origin);
  /// Matches `text` itself.
  static Pattern literal(const std::string& text, std::string origin);

  /// The matches in `subject`, a stand-in as above, from left to right. Throws DataError where the
  /// expression needs more steps than any sane one does.
  std::vector<Span> find_all(std::string_view subject) const;

 private:
  Pattern(const std::string& expression, bool literal, std::string origin);

  std::string origin_;
  std::string expression_;
  std::shared_ptr<const void> code_;
};

}  // namespace moba::llm
