#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// A token that is found in the text before anything is split or merged.
struct AddedToken {
  std::int32_t id = -1;
  std::string text;
  bool special = false;
  bool single_word = false;  // only where no letter, digit or mark touches it
  bool left_strip = false;   // takes the spaces before it too
  bool right_strip = false;  // and those after it
  bool normalized = false;   // looked for after normalisation
};

/// A stretch of a text; `id` is -1 where it is plain text.
struct Segment {
  Span span;
  std::int32_t id = -1;
};

/// Finds added tokens in a text: the leftmost first, of those the longest.
class AddedTokens {
 public:
  /// `key` is what is looked for: the token's text, normalised or not.
  void add(const std::string& key, AddedToken token);

  /// The text in order, without empty stretches. A special token counts only where `allows(span)`.
  std::vector<Segment> split(std::string_view text, const std::function<bool(Span)>& allows) const;

 private:
  std::int32_t child(std::int32_t node, char byte) const;
  const AddedToken* longest_at(std::string_view text, std::size_t at, std::size_t& end) const;

  // A trie: `edges_` by node * 256 + byte, `token_at_` by node, -1 where none ends.
  std::unordered_map<std::int64_t, std::int32_t> edges_;
  std::vector<std::int32_t> token_at_{-1};
  std::vector<AddedToken> tokens_;
};

}  // namespace moba::llm
