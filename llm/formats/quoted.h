#pragma once

#include <string>
#include <string_view>

namespace moba::llm {

/// Returns text from a file for a message: on one line, its first 80 bytes.
std::string one_line(std::string_view text);
/// Returns it in quotes.
std::string quoted(std::string_view text);

}  // namespace moba::llm
