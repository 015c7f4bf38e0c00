#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// A token that is matched in the text before splitting and merging.
struct AddedToken {
  std::int32_t id = -1;
  std::string text;
  bool special = false;
  bool single_word = false;  // matches only without an adjacent letter, digit or mark
  bool left_strip = false;   // includes the spaces before it
  bool right_strip = false;  // and those after it
  bool normalized = false;   // matched after normalisation
};

/// A segment of a text; `id` is -1 for plain text.
struct Segment {
  Span span;
  std::int32_t id = -1;
};

/// Finds added tokens in a text: the leftmost, of those the longest.
class AddedTokens {
 public:
  /// `key` is the text to match: the token's, normalised or not.
  void add(const std::string& key, AddedToken token);

  /// Splits the text into segments, none empty. A special token matches only if `allows(span)`.
  std::vector<Segment> split(std::string_view text, const std::function<bool(Span)>& allows) const;

 private:
  std::int32_t child(std::int32_t node, char byte) const;
  const AddedToken* longest_at(std::string_view text, std::size_t at, std::size_t& end) const;

  // A trie: `edges_` by node * 256 + byte, `token_at_` by node, -1 if none ends.
  std::unordered_map<std::int64_t, std::int32_t> edges_;
  std::vector<std::int32_t> token_at_{-1};
  std::vector<AddedToken> tokens_;
};

}  // namespace moba::llm
