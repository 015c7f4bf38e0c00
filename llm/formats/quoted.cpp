#include "llm/formats/quoted.h"

#include <fmt/format.h>

namespace moba::llm {

std::string one_line(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  std::string line;
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    line += byte < 0x20 || byte == 0x7F ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
  }
  return text.size() > kLongest ? line + "..." : line;
}

std::string quoted(std::string_view text) {
  return fmt::format("'{}'", one_line(text));
}

}  // namespace moba::llm
