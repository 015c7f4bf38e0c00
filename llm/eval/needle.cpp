#include "llm/eval/needle.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "llm/error.h"
#include "llm/eval/words.h"
#include "llm/session/text_stream.h"

namespace moba::llm::eval {
namespace {

constexpr const char* kDigits = "0123456789";

/// Returns the beginning of the line that `at` lies in; in text of a single line, that of the word.
std::size_t beginning_at(const std::string& text, std::size_t at) {
  constexpr std::size_t kFar = 2000;
  if (at == 0 || at >= text.size()) return at;
  for (const char* breaks : {"\n", " "}) {
    const std::size_t found = text.find_last_of(breaks, at - 1);
    if (found != std::string::npos && at - found < kFar) return found + 1;
  }
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;  // inside a character
  return at;
}

}  // namespace

std::string planted(const std::string& text, const std::string& line, double depth) {
  const std::size_t at =
      beginning_at(text, static_cast<std::size_t>(depth * static_cast<double>(text.size())));
  const bool begins_line = at == 0 || text[at - 1] == '\n';
  return text.substr(0, at) + (begins_line ? "" : "\n") + line + "\n" + text.substr(at);
}

std::string first_number(const std::string& answer) {
  const std::size_t begin = answer.find_first_of(kDigits);
  if (begin == std::string::npos) return "";
  return answer.substr(begin, answer.find_first_not_of(kDigits, begin) - begin);
}

bool has_whole_number(const std::string& answer) {
  const std::size_t begin = answer.find_first_of(kDigits);
  return begin != std::string::npos && answer.find_first_not_of(kDigits, begin) != std::string::npos;
}

const std::vector<std::int32_t>& NeedleMaker::text_for(std::int64_t length, std::int64_t sample) {
  if (length != length_ || sample != sample_) {
    Random random{settings_.seed, length, sample};
    text_ = haystack_.take(tokenizer_, length, random);
    length_ = length;
    sample_ = sample;
  }
  return text_;
}

NeedleCase NeedleMaker::make(std::int64_t length, double depth, std::int64_t sample) {
  Random random{settings_.seed, length, sample, std::llround(1e6 * depth)};
  NeedleCase made{random_name(random), random.number(settings_.digits), {}};
  const std::vector<std::pair<std::string, std::string>> fact{{"key", made.key}, {"value", made.value}};
  const std::string needle = filled(settings_.needle, fact), question = filled(settings_.question, fact);
  const std::vector<std::int32_t>& text = text_for(length, sample);

  const auto prompt_with = [&](std::int64_t tokens) {
    const auto end = text.begin() + std::min<std::int64_t>(tokens, static_cast<std::int64_t>(text.size()));
    std::string around = TextStream().push(tokenizer_.decode({text.begin(), end}));
    if (!around.empty() && !around.ends_with('\n')) around += '\n';
    return tokens_of({planted(around, needle, depth) + question, ""}, tokenizer_, settings_.chat);
  };
  const std::int64_t units = units_that_fit(length - settings_.answer_tokens, [&](std::int64_t tokens) {
    return static_cast<std::int64_t>(prompt_with(tokens).size());
  });
  if (units < 1) {
    throw UsageError(
        fmt::format("--lengths: expected room for the question, the answer ({} tokens) and some text, got {}",
                    settings_.answer_tokens, length));
  }
  made.prompt = prompt_with(units);
  return made;
}

}  // namespace moba::llm::eval
