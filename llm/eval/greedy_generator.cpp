#include "llm/eval/greedy_generator.h"

#include <algorithm>
#include <span>

#include "llm/session/sampler.h"
#include "llm/session/text_stream.h"

namespace moba::llm::eval {

std::int64_t GreedyGenerator::shared_with(const std::vector<std::int32_t>& prompt) const {
  // The tail of a prompt is read with another attention variant than the rest.
  const std::int64_t tail = settings_.prefill == AttentionMode::full ? 0 : settings_.full_tail;
  const auto differs = std::mismatch(cached_.begin(), cached_.end(), prompt.begin(), prompt.end()).first;
  const auto cached = static_cast<std::int64_t>(cached_.size()),
             size = static_cast<std::int64_t>(prompt.size());
  return std::max<std::int64_t>(0,
                                std::min({differs - cached_.begin(), cached - tail, size - tail, size - 1}));
}

std::string GreedyGenerator::generate(const std::vector<std::int32_t>& prompt, std::int64_t max_tokens,
                                      const Session::Progress& progress,
                                      const std::function<bool(const std::string&)>& is_enough) {
  const std::int64_t shared = shared_with(prompt);
  session_.rewind(shared);
  cached_ = prompt;
  std::vector<float> logits =
      session_.prefill(std::span(prompt).subspan(static_cast<std::size_t>(shared)), [&](double tokens) {
        if (progress) progress(static_cast<double>(shared) + tokens);
      });

  const std::vector<std::int32_t>& ends = tokenizer_.end_tokens();
  Sampler likeliest({});
  TextStream stream;
  std::string text;
  for (std::int64_t written = 1;; ++written) {
    const std::int32_t token = likeliest(logits);
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) return text;
    text += stream.push(tokenizer_.piece(token));
    if (written >= max_tokens || (is_enough && is_enough(text))) return text;
    logits = session_.decode(token);
  }
}

}  // namespace moba::llm::eval
