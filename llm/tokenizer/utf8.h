#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace moba::llm {

/// A range of a text, in bytes.
struct Span {
  std::size_t begin = 0;
  std::size_t end = 0;

  bool empty() const { return begin == end; }
  std::size_t size() const { return end - begin; }
  std::string_view of(std::string_view text) const { return text.substr(begin, end - begin); }
};

/// Returns the bytes of the well-formed UTF-8 sequence at the start of `text`, or 0.
std::size_t utf8_size(std::string_view text);
/// As utf8_size(), but counts an ill-formed byte as a character. `text` is not empty.
std::size_t character_size(std::string_view text);
/// Returns the code point of one well-formed sequence.
char32_t utf8_decode(std::string_view sequence);
void utf8_append(std::string& text, char32_t code_point);

/// Returns whether a character is Unicode's White_Space.
bool is_space(char32_t code_point);
/// Returns whether `\w` of Rust's regex crate matches a character: letters, marks, decimal digits,
/// connectors.
bool is_word(char32_t code_point);

enum class UnicodeForm { kNfc, kNfd, kNfkc, kNfkd };

/// Returns a Unicode normalisation form of `text`; bytes that are not UTF-8 stay as they are. Takes linear
/// time, also for long runs of combining marks.
std::string to_unicode_form(std::string_view text, UnicodeForm form);

}  // namespace moba::llm
