#include "llm/session/stop_text.h"

#include <algorithm>

namespace moba::llm {
namespace {

/// Returns the length of the longest end of `text` that begins `sequence`.
std::size_t overlap(std::string_view text, std::string_view sequence) {
  for (std::size_t size = std::min(text.size(), sequence.size() - 1); size > 0; --size) {
    if (text.ends_with(sequence.substr(0, size))) return size;
  }
  return 0;
}

}  // namespace

StopText::StopText(std::vector<std::string> sequences) : sequences_(std::move(sequences)) {
  std::erase(sequences_, "");
}

std::string StopText::push(std::string_view text) {
  if (found_) return "";
  pending_ += text;
  std::size_t begin = std::string::npos, end = std::string::npos, held = 0;
  for (const std::string& sequence : sequences_) {
    const std::size_t found = pending_.find(sequence);
    held = std::max(held, overlap(pending_, sequence));
    if (found == std::string::npos) continue;
    found_ = true;
    const std::size_t found_end = found + sequence.size();
    if (found_end < end || (found_end == end && found < begin)) {
      begin = found;
      end = found_end;
    }
  }
  if (!found_) begin = pending_.size() - held;
  std::string certain = pending_.substr(0, begin);
  pending_.erase(0, begin);
  return certain;
}

std::string StopText::finish() {
  return found_ ? "" : std::exchange(pending_, "");
}

}  // namespace moba::llm
