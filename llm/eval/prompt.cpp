#include "llm/eval/prompt.h"

#include <algorithm>

namespace moba::llm::eval {

bool asks_by_chat(const Tokenizer& tokenizer, bool no_chat) {
  return !no_chat && !tokenizer.chat_template().empty();
}

std::vector<std::int32_t> tokens_of(const Prompt& prompt, const Tokenizer& tokenizer, bool chat) {
  if (!chat) return tokenizer.encode(prompt.text + prompt.answer_start, /*add_special=*/true, false);
  std::vector<std::int32_t> ids = apply_chat_template(tokenizer, {{"user", prompt.text}});
  const std::vector<std::int32_t> start = tokenizer.encode(prompt.answer_start, /*add_special=*/false, false);
  ids.insert(ids.end(), start.begin(), start.end());
  return ids;
}

std::string filled(std::string text, const std::vector<std::pair<std::string, std::string>>& values) {
  for (const auto& [name, value] : values) {
    const std::string mark = "{" + name + "}";
    for (std::size_t at = 0; (at = text.find(mark, at)) != std::string::npos; at += value.size())
      text.replace(at, mark.size(), value);
  }
  return text;
}

std::int64_t units_that_fit(std::int64_t max_tokens,
                            const std::function<std::int64_t(std::int64_t)>& tokens_with) {
  struct Try {
    std::int64_t units, tokens;
  };
  const std::int64_t slack = max_tokens / 256;
  Try fits{0, tokens_with(0)}, exceeds{0, 0};
  if (fits.tokens > max_tokens) return -1;
  double tokens_a_unit = 1;
  while (max_tokens - fits.tokens > slack) {
    const double more = static_cast<double>(max_tokens - fits.tokens) / tokens_a_unit;
    std::int64_t units = fits.units + std::max<std::int64_t>(1, static_cast<std::int64_t>(more));
    if (exceeds.units > 0) {
      if (exceeds.units == fits.units + 1) break;
      if (units >= exceeds.units) units = (fits.units + exceeds.units) / 2;
    }
    const Try next{units, tokens_with(units)};
    if (next.tokens <= fits.tokens) break;  // all units are in
    const double slope =
        static_cast<double>(next.tokens - fits.tokens) / static_cast<double>(units - fits.units);
    tokens_a_unit = slope;
    (next.tokens <= max_tokens ? fits : exceeds) = next;
  }
  return fits.units;
}

}  // namespace moba::llm::eval
