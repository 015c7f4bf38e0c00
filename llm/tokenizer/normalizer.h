#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// Puts `text` before whatever is not empty.
struct Prepend {
  std::string text;
};
struct Replace {
  std::string from;  // not empty
  std::string to;
};

/// The normalisation of a text before it is split: the steps in order.
using Normalizer = std::vector<std::variant<UnicodeForm, Prepend, Replace>>;

std::string normalize(std::string_view text, const Normalizer& steps);

std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

}  // namespace moba::llm
