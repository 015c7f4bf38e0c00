#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moba::llm {

/// Ends a text before the first of several stop sequences that is complete. Text that may be the begin of one
/// is held back.
class StopText {
 public:
  /// Empty sequences are ignored.
  explicit StopText(std::vector<std::string> sequences);

  /// Adds text; returns what no stop sequence can still remove. Nothing after found().
  std::string push(std::string_view text);
  /// Returns the text held back, at the end of a text without a stop sequence.
  std::string finish();
  /// Whether a stop sequence has ended the text.
  bool found() const { return found_; }

 private:
  std::vector<std::string> sequences_;
  std::string pending_;
  bool found_ = false;
};

}  // namespace moba::llm
