#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "llm/tokenizer/pattern.h"
#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// The treatment of the matches of a Split.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Split {
  Pattern pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // what lies between the matches counts as the match
};

/// A space before every piece that begins with none.
struct AddPrefixSpace {};

/// Spaces written as a visible mark, and one mark put before the text.
struct Metaspace {
  enum class Prepend { kAlways, kFirst, kNever };
  std::string mark;
  Prepend prepend = Prepend::kAlways;
};

/// Cuts a text into the pieces that merges stay within: the steps in order.
using PreTokenizer = std::vector<std::variant<Split, AddPrefixSpace, Metaspace>>;

/// A text and the pieces it is cut into, in order, none empty.
struct Pieces {
  std::string text;
  std::vector<Span> spans;
};

/// `at_start`: nothing came before `text` in the input.
Pieces pre_tokenize(std::string text, bool at_start, const PreTokenizer& steps);

/// The GPT-2 pattern, which is ByteLevel's own.
inline constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace moba::llm
