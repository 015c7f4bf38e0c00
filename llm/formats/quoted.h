#pragma once

#include <string>
#include <string_view>

namespace moba::llm {

/// Text from a file as a message can hold it: on one line, not longer than 80 bytes of it.
std::string one_line(std::string_view text);
/// The same in quotes.
std::string quoted(std::string_view text);

}  // namespace moba::llm
