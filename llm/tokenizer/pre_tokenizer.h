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
  bool invert = false;  // the text between matches counts as the match
};

/// Prepends a space to every word without one.
struct AddPrefixSpace {};

/// Writes spaces as a visible mark, and prepends one mark to the text.
struct Metaspace {
  enum class Prepend { kAlways, kFirst, kNever };
  std::string mark;
  Prepend prepend = Prepend::kAlways;
};

/// The steps of splitting a text into words, which merges stay within, in order.
using PreTokenizer = std::vector<std::variant<Split, AddPrefixSpace, Metaspace>>;

/// A text and its words, in order, none empty.
struct Pieces {
  std::string text;
  std::vector<Span> spans;
};

/// `at_start`: `text` is the beginning of the input.
Pieces pre_tokenize(std::string text, bool at_start, const PreTokenizer& steps);

/// The pattern of GPT-2, which ByteLevel uses.
inline constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace moba::llm
