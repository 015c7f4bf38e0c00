#pragma once

#include <string>
#include <string_view>

namespace moba::llm {

/// Text from a file as an error message can hold it: in quotes, on one line, not longer than 80 bytes.
std::string quoted(std::string_view text);

}  // namespace moba::llm
