#include "llm/session/text_stream.h"

#include <cstddef>

namespace moba::llm {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

/// Properties of a leading byte (The Unicode Standard, table 3-7): the bytes of the character, and the range
/// of the second.
struct Lead {
  std::size_t length;
  unsigned char low = 0x80, high = 0xBF;
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {1};
  if (byte >= 0xC2 && byte <= 0xDF) return {2};
  if (byte == 0xE0) return {3, 0xA0};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {3};
  if (byte == 0xF0) return {4, 0x90};
  if (byte >= 0xF1 && byte <= 0xF3) return {4};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0};
}

/// Returns the number of bytes at the start of `text` that are a character or a valid prefix of one.
std::size_t fitting_bytes(std::string_view text, const Lead& lead) {
  std::size_t fitting = 1;
  while (fitting < lead.length && fitting < text.size()) {
    const auto byte = static_cast<unsigned char>(text[fitting]);
    const bool second = fitting == 1;
    if (byte < (second ? lead.low : 0x80) || byte > (second ? lead.high : 0xBF)) break;
    ++fitting;
  }
  return fitting;
}

}  // namespace

std::string TextStream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string text;
  std::size_t done = 0;
  while (done < pending_.size()) {
    const std::string_view rest = std::string_view(pending_).substr(done);
    const Lead lead = lead_of(static_cast<unsigned char>(rest.front()));
    const std::size_t fitting = fitting_bytes(rest, lead);
    const bool complete = fitting == lead.length;
    if (!complete && lead.length > 0 && fitting == rest.size()) break;  // the rest may follow
    text += complete ? rest.substr(0, fitting) : kReplacement;
    done += fitting;
  }
  pending_.erase(0, done);
  return text;
}

std::string TextStream::finish() {
  std::string text(pending_.empty() ? "" : kReplacement);
  pending_.clear();
  return text;
}

}  // namespace moba::llm
