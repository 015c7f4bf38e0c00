#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace moba::llm {

/// A stretch of a text, in bytes.
struct Span {
  std::size_t begin = 0;
  std::size_t end = 0;

  bool empty() const { return begin == end; }
  std::size_t size() const { return end - begin; }
  std::string_view of(std::string_view text) const { return text.substr(begin, end - begin); }
};

/// Bytes of the well-formed UTF-8 sequence that `text` begins with; 0 where it begins with none.
std::size_t utf8_size(std::string_view text);
/// As utf8_size(), an ill-formed byte counting as a character of its own. `text` is not empty.
std::size_t character_size(std::string_view text);
/// The code point of one well-formed sequence.
char32_t utf8_decode(std::string_view sequence);
void utf8_append(std::string& text, char32_t code_point);

/// Unicode's White_Space.
bool is_space(char32_t code_point);
/// The characters of `\w` in Rust's regex crate: letters, marks, decimal digits, connectors.
bool is_word(char32_t code_point);

enum class UnicodeForm { kNfc, kNfd, kNfkc, kNfkd };

/// A Unicode normalisation form of the well-formed stretches of `text`; other bytes stay as they are.
/// Takes time proportional to the text, whatever runs of combining marks it holds.
std::string to_unicode_form(std::string_view text, UnicodeForm form);

}  // namespace moba::llm
