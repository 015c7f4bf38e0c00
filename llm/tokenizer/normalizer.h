#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// Prepends `text` unless the input is empty.
struct Prepend {
  std::string text;
};
struct Replace {
  std::string from;  // not empty
  std::string to;
};

/// The steps of normalising a text before it is split, in order.
using Normalizer = std::vector<std::variant<UnicodeForm, Prepend, Replace>>;

std::string normalize(std::string_view text, const Normalizer& steps);

std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

}  // namespace moba::llm
