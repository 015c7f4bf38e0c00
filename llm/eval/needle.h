#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llm/eval/haystack.h"
#include "llm/eval/prompt.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::llm::eval {

/// The templates of a planted fact and of its question. {key} and {value} stand for its name and its number.
struct NeedleSettings {
  std::string needle, question;
  std::int64_t digits = 7;
  /// Tokens of a length that are kept free for the answer.
  std::int64_t answer_tokens = 32;
  bool chat = false;
  std::int64_t seed = 0;
};

inline constexpr const char* kNeedle = "The magic number of {key} is {value}.";
inline constexpr const char* kChatQuestion = "What is the magic number of {key}?";
/// A model without chat turns continues the question.
inline constexpr const char* kBareQuestion =
    "What is the magic number of {key}?\nThe magic number of {key} is";

struct NeedleCase {
  std::string key, value;
  std::vector<std::int32_t> prompt;
};

/// Creates prompts: lines of text, one of them the needle, then the question. All depths of one length and
/// sample have the same text around them.
class NeedleMaker {
 public:
  /// `haystack` and `tokenizer` must outlive this object.
  NeedleMaker(const Haystack& haystack, const Tokenizer& tokenizer, NeedleSettings settings)
      : haystack_(haystack), tokenizer_(tokenizer), settings_(std::move(settings)) {}

  /// Returns a prompt of nearly `length` tokens, room for the answer included, with the needle after the
  /// share `depth` of the text, at the beginning of a line. Throws UsageError for a length that cannot hold
  /// the question, DataError if the text is too short.
  NeedleCase make(std::int64_t length, double depth, std::int64_t sample);

 private:
  const std::vector<std::int32_t>& text_for(std::int64_t length, std::int64_t sample);

  const Haystack& haystack_;
  const Tokenizer& tokenizer_;
  NeedleSettings settings_;
  std::vector<std::int32_t> text_;  // of the latest length and sample
  std::int64_t length_ = -1, sample_ = -1;
};

/// Returns `text` with `line` inserted at the beginning of a line after the share `depth` of it.
std::string planted(const std::string& text, const std::string& line, double depth);

/// Returns the digits of the first number in an answer, or "".
std::string first_number(const std::string& answer);
/// Returns whether the first number is complete: another character follows it.
bool has_whole_number(const std::string& answer);

}  // namespace moba::llm::eval
