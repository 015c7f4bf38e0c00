#include "llm/formats/quoted.h"

#include <fmt/format.h>

namespace moba::llm {

std::string quoted(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  std::string line = "'";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) {
      line += fmt::format("\\x{:02x}", byte);
    } else {
      line += c;
    }
  }
  return line + (text.size() > kLongest ? "...'" : "'");
}

}  // namespace moba::llm
